"""Many clients at once, of every dialect, some of which go away or talk nonsense: nothing leaks, nobody gets another's answer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from tests.server.conftest import NAME, Running

AT_ONCE = 24
PROMPTS = [f"{'shared ' * (i % 5)}prompt number {i}" for i in range(12)]
NONSENSE: list[tuple[str, Any]] = [
    ("/v1/chat/completions", {"model": NAME, "messages": "no list"}),
    ("/v1/chat/completions", {"model": NAME, "messages": [], "max_tokens": -1}),
    ("/v1/completions", {"model": "nobody", "prompt": "a"}),
    ("/v1/completions", {"model": NAME, "prompt": "x" * 20_000}),
    ("/v1/completions", {"model": NAME, "prompt": "a", "logit_bias": {"900000": 1}}),
    ("/api/chat", {"model": NAME, "messages": [{"role": "user"}]}),
    ("/api/generate", {"model": NAME, "prompt": "a", "options": {"top_k": -3}}),
    ("/v1/messages", {"model": NAME, "max_tokens": 3}),
    ("/v1/embeddings", {"model": NAME, "input": []}),
]


def asked(kind: str, prompt: str, seed: int) -> tuple[str, dict[str, Any]]:
    """A request of each kind, with an answer that only its prompt and seed decide."""
    messages = [{"role": "user", "content": prompt}]
    common: dict[str, Any] = {"model": NAME, "temperature": 0.9, "seed": seed, "max_tokens": 12}
    options = {"temperature": 0.9, "seed": seed, "num_predict": 12}
    return {
        "chat": ("/v1/chat/completions", {**common, "messages": messages}),
        "samples": ("/v1/chat/completions", {**common, "messages": messages, "n": 3}),
        "completion": ("/v1/completions", {**common, "prompt": prompt, "logprobs": 1}),
        "ollama": ("/api/chat", {"model": NAME, "messages": messages, "options": options, "stream": False}),
        "generate": ("/api/generate", {"model": NAME, "prompt": prompt, "raw": True, "options": options, "stream": False}),
        "embed": ("/v1/embeddings", {"model": NAME, "input": prompt, "encoding_format": "float"}),
    }[kind]


KINDS = ("chat", "samples", "completion", "ollama", "generate", "embed")


def essence(kind: str, answer: dict[str, Any]) -> Any:
    """What must be the same whenever it is asked for."""
    if kind == "ollama":
        return answer["message"]["content"]
    if kind == "generate":
        return answer["response"]
    if kind == "embed":
        return tuple(answer["data"][0]["embedding"])
    return tuple((choice.get("text") or choice["message"]["content"], choice["finish_reason"]) for choice in answer["choices"])


async def some_of(client: httpx.AsyncClient, path: str, body: dict[str, Any], random_: random.Random) -> None:
    """Read the beginning of an answer."""
    async with client.stream("POST", path, json=body) as answer:
        async for _ in answer.aiter_bytes():
            if random_.random() < 0.3:
                return


async def one(client: httpx.AsyncClient, number: int, seen: dict[Any, Any], counts: Counter[str]) -> None:
    random_ = random.Random(number)
    what = random_.random()
    if what < 0.12:
        path, body = random_.choice(NONSENSE)
        status = (await client.post(path, json=body)).status_code
        assert 400 <= status < 500, (path, body, status)
        counts["refused"] += 1
        return
    kind, prompt, seed = random_.choice(KINDS), random_.choice(PROMPTS), random_.randint(0, 2)
    path, body = asked(kind, prompt, seed)
    if what < 0.3:  # leaves early
        body |= {} if kind == "embed" else {"stream": True}
        with contextlib.suppress(asyncio.TimeoutError, httpx.HTTPError):
            await asyncio.wait_for(some_of(client, path, body, random_), random_.random() * 0.3)
        counts["left"] += 1
        return
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found = essence(kind, answer.json())
    assert seen.setdefault((kind, prompt, seed), found) == found
    counts["answered"] += 1


async def soak(url: str, requests: int) -> Counter[str]:
    seen: dict[Any, Any] = {}
    counts: Counter[str] = Counter()
    places = asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def placed(number: int) -> None:
            async with places:
                await one(client, number, seen, counts)

        await asyncio.gather(*(placed(number) for number in range(requests)))
    return counts


@pytest.mark.slow
def test_a_crowd(serve: Callable[..., Running]) -> None:
    block = 64 * 2 * 2 * 2 * 16 * 4
    running = serve(max_batch=8, cache_bytes=24 * block)  # little more than one window: answers give way to each other
    asyncio.run(soak(running.url, 300))
    running.settle()
    gc.collect()
    before = psutil.Process().memory_info().rss
    counts = asyncio.run(soak(running.url, 1500))
    assert counts["answered"] > 900
    assert counts["left"] > 100
    assert counts["refused"] > 100
    running.settle()
    gc.collect()
    engine = running.server.models.loaded[NAME].llm.engine
    assert not engine.cache.live
    assert engine.scheduler.idle
    assert psutil.Process().memory_info().rss < 1.05 * before + 20e6
    assert running.client.get("/health").status_code == 200
