"""Many clients at once, of every dialect, some of which go away or talk nonsense; what they were told is compared with what they are told alone.

    python -m tests.server.soak --requests 5000                                   # a tiny model made for it
    python -m tests.server.soak --requests 200 --model qwen2.5-coder:0.5b         # a real one of this machine

A server is started for it in a process of its own, with a cache so small that answers give way to each other. It fails where an
answer differs, log-probabilities included, where a status is 500 or above, where blocks of the cache are still held at the end, where
no answer gave way, and where the server's memory has grown by more than 5 % after the first sixth of the requests.
Left out: what pytest runs of it, in its own process (test_soak.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

AT_ONCE = 24
GROWTH = 1.05
PROMPTS = [f"{'shared ' * (i % 5)}prompt number {i}" for i in range(12)]
KINDS = ("chat", "samples", "completion", "long", "responses", "messages", "ollama", "generate", "embed", "vectors")
SEEDED = {"chat", "samples", "completion", "long", "ollama", "generate"}
CONTEXT = 512  # tokens of the window, for which eight blocks of the cache are needed
BROKEN = re.compile(r" /(?!health)\S* 5[0-9][0-9] [0-9.]+ s$")  # a line of the log
CACHE = 10  # blocks that there are: long answers give way to each other


@dataclass
class Soak:
    """A model that is asked, and what it said."""

    model: str
    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))
    tokens: int = 12
    long: int = 150  # more than two blocks, which nobody has put aside for it
    body_bytes: int = 16 << 20  # the server's limit
    seen: dict[Any, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def asked(self, kind: str, prompt: str, seed: int) -> tuple[str, dict[str, Any]]:
        """A request of each kind, with an answer that only its prompt and seed decide."""
        messages = [{"role": "user", "content": prompt}]
        named: dict[str, Any] = {"model": self.model}
        common = {**named, "temperature": 0.9, "seed": seed, "max_tokens": self.tokens}
        options = {"options": {"temperature": 0.9, "seed": seed, "num_predict": self.tokens}, "stream": False}
        return {
            "chat": ("/v1/chat/completions", {**common, "messages": messages}),
            "samples": ("/v1/chat/completions", {**common, "messages": messages, "n": 3}),
            "completion": ("/v1/completions", {**common, "prompt": prompt, "logprobs": 1}),
            "long": ("/v1/completions", {**common, "prompt": prompt, "max_tokens": self.long, "logprobs": 0}),
            "responses": ("/v1/responses", {**named, "input": prompt, "temperature": 0, "max_output_tokens": self.tokens}),
            "messages": ("/v1/messages", {**named, "messages": messages, "temperature": 0, "max_tokens": self.tokens}),
            "ollama": ("/api/chat", {**named, "messages": messages, **options}),
            "generate": ("/api/generate", {**named, "prompt": prompt, "raw": True, **options}),
            "embed": ("/v1/embeddings", {**named, "input": prompt, "encoding_format": "float"}),
            "vectors": ("/api/embed", {**named, "input": [prompt, "another"]}),
        }[kind]

    def nonsense(self, random_: random.Random) -> tuple[str, bytes]:
        """A body that has to be refused."""
        model = self.model
        path, body = random_.choice(
            [
                ("/v1/chat/completions", {"model": model, "messages": "no list"}),
                ("/v1/chat/completions", {"model": model, "messages": [], "max_tokens": -1}),
                ("/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": "a"}], "n": 1_000_000}),
                (
                    "/v1/chat/completions",
                    {"model": model, "messages": [{"role": "user", "content": "a"}], "response_format": {"type": "x"}},
                ),
                ("/v1/completions", {"model": "nobody", "prompt": "a"}),
                ("/v1/completions", {"model": model, "prompt": "x" * 400_000}),
                ("/v1/completions", {"model": model, "prompt": "a", "logit_bias": {"900000": 1}}),
                ("/v1/responses", {"model": model, "input": [{"type": "nothing"}]}),
                ("/v1/embeddings", {"model": model, "input": []}),
                ("/v1/messages", {"model": model, "max_tokens": 3}),
                ("/api/chat", {"model": model, "messages": [{"role": "user"}]}),
                ("/api/generate", {"model": model, "prompt": "a", "options": {"top_k": -3}}),
                ("/api/show", {"model": "../../etc/passwd"}),
            ]
        )
        whole = json.dumps(body).encode()
        what = random_.random()
        if what < 0.2:
            return path, whole[: random_.randrange(1, len(whole) - 1)]  # cut off
        if what < 0.3:
            return path, random_.randbytes(200)
        return (path, b" " * (self.body_bytes + 1)) if what < 0.33 else (path, whole)

    async def one(self, client: httpx.AsyncClient, number: int) -> None:
        """A request, whatever the number makes of it."""
        random_ = random.Random(number)
        what = random_.random()
        if what < 0.12:
            path, body = self.nonsense(random_)
            status = (await client.post(path, content=body)).status_code
            assert 400 <= status < 500, (path, body[:200], status)
            self.counts["refused"] += 1
            return
        kind, prompt, seed = random_.choice(KINDS), random_.choice(self.prompts), random_.randint(0, 2)
        if what < 0.3:
            await self.leave_early(client, kind, prompt, seed, random_)
            return
        await self.answered(client, kind, prompt, seed)

    async def leave_early(self, client: httpx.AsyncClient, kind: str, prompt: str, seed: int, random_: random.Random) -> None:
        """Ask and go away: before an answer, or in the middle of a stream."""
        path, body = self.asked(kind, prompt, seed)
        body |= {} if kind in ("embed", "vectors") else {"stream": random_.random() < 0.8}

        async def some() -> None:
            async with client.stream("POST", path, json=body) as answer:
                assert answer.status_code == 200, (path, answer.status_code)
                async for _ in answer.aiter_bytes():
                    if random_.random() < 0.3:
                        return

        with contextlib.suppress(asyncio.TimeoutError, httpx.HTTPError):
            await asyncio.wait_for(some(), random_.random() * 0.3)
        self.counts["left"] += 1

    async def answered(self, client: httpx.AsyncClient, kind: str, prompt: str, seed: int) -> None:
        """Ask, and compare with what was said before."""
        path, body = self.asked(kind, prompt, seed)
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        found = essence(kind, answer.json())
        assert self.seen.setdefault((kind, prompt, seed if kind in SEEDED else 0), found) == found, (kind, prompt, seed)
        self.counts["answered"] += 1

    async def alone(self, url: str) -> None:
        """Everything that will be asked, one after the other: what is right."""
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            for kind in KINDS:
                for prompt in self.prompts:
                    for seed in range(3) if kind in SEEDED else (0,):
                        await self.answered(client, kind, prompt, seed)

    async def crowd(self, url: str, numbers: range) -> None:
        """So many requests, some at once."""
        places = asyncio.Semaphore(AT_ONCE)
        limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

            async def placed(number: int) -> None:
                async with places:
                    await self.one(client, number)

            await asyncio.gather(*(placed(number) for number in numbers))


def essence(kind: str, answer: dict[str, Any]) -> Any:
    """What must be the same whenever it is asked for."""
    if kind in ("embed", "vectors"):
        return json.dumps(answer["data"][0]["embedding"] if kind == "embed" else answer["embeddings"])
    if kind == "ollama":
        return answer["message"]["content"]
    if kind == "generate":
        return answer["response"]
    if kind == "messages":
        return json.dumps(answer["content"])
    if kind == "responses":
        return json.dumps([item["content"][0]["text"] for item in answer["output"]])
    said = [
        (choice.get("text") or choice["message"]["content"], choice["finish_reason"], choice["logprobs"]) for choice in answer["choices"]
    ]
    return json.dumps(said)


# --- a server of its own


@contextlib.contextmanager
def served(home: Path | None, *flags: str) -> Iterator[tuple[str, psutil.Process, Path]]:
    """`qwen2 serve`: where it is, its process and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    environment = {**os.environ} if home is None else {**os.environ, "QWEN2_HOME": str(home)}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as written:
            command = [sys.executable, "-m", "qwen2", "serve", "--port", str(port), *flags]
            process = subprocess.Popen(command, env=environment, stderr=written)
            try:
                url = f"http://127.0.0.1:{port}"
                while not healthy(url):
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.1)
                yield url, psutil.Process(process.pid), log
            finally:
                process.kill()
                process.wait(20)


def healthy(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    return False


def tiny_home(folder: Path) -> Path:
    """A store with a tiny model."""
    from qwen2.config import tiny
    from qwen2.weights.export import to_hf_folder
    from qwen2.weights.store import Store
    from tests.conftest import tiny_model

    to_hf_folder(tiny_model(tiny(context=1024), 0), folder / "model")
    Store(folder / "home").copy(str(folder / "model"), "tiny:one")
    return folder / "home"


def block_bytes(home: Path | None, model: str) -> int:
    """Of a block of its cache."""
    from qwen2.engine.blocks import KernelMemory
    from qwen2.weights.model import load

    return KernelMemory(load(model, home=home, packed=True).config, 16).block_bytes


def held(url: str) -> dict[str, float]:
    """What of the engine is still in use, of all models."""
    read = httpx.get(f"{url}/metrics", timeout=60).text
    totals: Counter[str] = Counter()
    for family in text_string_to_metric_families(read):
        totals[family.name] += sum(sample.value for sample in family.samples if sample.name in (family.name, f"{family.name}_total"))
    blocks = totals["qwen2_cache_blocks_used"] - totals["qwen2_cache_blocks_idle"]
    return {
        "blocks": blocks,
        "running": totals["qwen2_running"],
        "waiting": totals["qwen2_waiting"],
        "gave_way": totals["qwen2_preemptions"],
    }


def settled(url: str, seconds: float = 30.0) -> dict[str, float]:
    """The same when nothing of it moves any more, or after so long."""
    begin = time.monotonic()
    while any((now := held(url))[name] for name in ("blocks", "running", "waiting")) and time.monotonic() - begin < seconds:
        time.sleep(0.05)
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--model", help="one of this machine; left out, a tiny one is made")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = None if args.model else tiny_home(Path(folder))
        soak = Soak("tiny:one") if home else Soak(args.model, PROMPTS[:2])
        cache = str(CACHE * block_bytes(home, soak.model) / 1e9)
        flags = ("--load", soak.model, "--max-batch", "8", "--cache-gb", cache, "--context", str(CONTEXT))
        with served(home, *flags) as (url, process, log):
            asyncio.run(soak.alone(url))
            alone = held(url)["gave_way"]
            memory = []
            for part in range(6):
                asyncio.run(soak.crowd(url, range(args.requests * part // 6, args.requests * (part + 1) // 6)))
                left = settled(url)
                memory.append(process.memory_info().rss / 2**20)
            broken = [line for line in log.read_text().splitlines() if BROKEN.search(line)]
    gave_way, growth = left["gave_way"] - alone, memory[-1] / memory[0]
    print(f"{args.requests} requests of {soak.model}: {dict(soak.counts)}, no answer differs from what was said alone")
    print(f"status 500 and above: {len(broken)}; held at the end: {left}; answers that gave way: {gave_way:.0f}")
    print(
        f"memory in MiB after each sixth: {', '.join(f'{one:.1f}' for one in memory)}: {growth - 1:+.2%}; {time.monotonic() - begin:.0f} s"
    )
    sys.exit(bool(broken) or any(left[name] for name in ("blocks", "running", "waiting")) or not gave_way or growth > GROWTH)


if __name__ == "__main__":
    main()
