"""What our server costs beyond the model, what a schema costs a token, what guesses give: ours beside ours.

Left out: other servers (serve.py).
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

from peer.load import clients, rate
from peer.schemas import strict
from peer.servers import Server

from qwen2 import LLM, SamplingParams
from qwen2.engine.constraint import Constraint
from qwen2.engine.request import Output

CLIENTS = 32
ROUNDS = 5
RECORD = strict(id={"type": "integer"}, name={"type": "string", "maxLength": 40}, price={"type": "number"}, open={"type": "boolean"})
RECORDS = {"type": "array", "items": RECORD, "minItems": 40}  # longer than any answer here
SCHEMA_TOKENS, EDIT_TOKENS = 96, 300
CODE = '''class Stack:
    """Last in, first out."""

    def __init__(self):
        self.items = []

    def put(self, item):
        """Add an item on top."""
        self.items.append(item)

    def take(self):
        """Remove the item on top and return it."""
        if not self.items:
            raise IndexError("the stack is empty")
        return self.items.pop()

    def peek(self):
        """The item on top, which stays."""
        if not self.items:
            raise IndexError("the stack is empty")
        return self.items[-1]

    def __len__(self):
        return len(self.items)

    def is_empty(self):
        """Whether there is nothing in it."""
        return not self.items

    def clear(self):
        """Remove everything."""
        self.items = []
'''
EDIT = f"Rename the method `put` to `push` and `take` to `pop`. Answer with the whole class and nothing else.\n```python\n{CODE}```"


def served(server: Server, bodies: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """With 32 clients: tokens a second, and the share of the time in which no kernel ran, by the server's own count."""
    before, begin = server.metric("qwen2_kernel_seconds_total"), time.perf_counter()
    heard = asyncio.run(clients(server.port, bodies, CLIENTS))
    seconds, busy = time.perf_counter() - begin, server.metric("qwen2_kernel_seconds_total") - before
    share = 1 - busy / seconds
    return rate(heard), [f"{CLIENTS} clients, {rate(heard):.0f} tokens/s: no kernel ran {share:.1%} of the time"]


def offline(path: Path, threads: int, bodies: list[dict[str, Any]], speed: float) -> list[str]:
    """The same requests without a server: what HTTP, events and clients on the same cores take."""
    llm = LLM(path, threads=threads)
    params = SamplingParams(temperature=0, max_tokens=bodies[0]["max_tokens"], ignore_eos=True)
    begin = time.perf_counter()
    outputs = answers(llm, [body["messages"] for body in bodies], params)
    alone = sum(one.usage.completion_tokens for one in outputs) / (time.perf_counter() - begin)
    return [f"the same requests by `LLM.generate`, without a server: {alone:.0f} tokens/s, of which the server has {speed / alone:.1%}"]


def answers(llm: LLM, chats: list[list[dict[str, str]]], params: SamplingParams) -> list[Output]:
    """Of several chats at once."""
    return llm.generate([llm.template.render(chat, add_generation_prompt=True).ids for chat in chats], params, progress=False)


def schema_cost(path: Path, threads: int) -> list[str]:
    """Seconds a token with and without a schema, alternating, one answer at a time and eight together; nothing is guessed."""
    llm, lines = LLM(path, threads=threads, guesses=0), []
    free = SamplingParams(temperature=0, max_tokens=SCHEMA_TOKENS, ignore_eos=True)
    held = SamplingParams(temperature=0, max_tokens=SCHEMA_TOKENS, constraint=Constraint.json_schema(RECORDS))
    for streams in (1, 8):
        times: dict[str, list[float]] = {"free": [], "held": []}
        for number in range(ROUNDS):
            chats = [[{"role": "user", "content": f"List {40 + number + i} invented articles of a shop as JSON."}] for i in range(streams)]
            for name, params in (("free", free), ("held", held)):
                outputs = answers(llm, chats, params)
                times[name].append(statistics.median(o.timings.decode_seconds / (o.usage.completion_tokens - 1) for o in outputs))
                if name == "held":
                    json.loads(outputs[0].text[: outputs[0].text.rindex("}") + 1] + "]")  # it is what was asked for, as far as it goes
        cost = statistics.median(b / a for a, b in zip(times["free"], times["held"], strict=True)) - 1
        plain, bound = (1e3 * statistics.median(times[name]) for name in ("free", "held"))
        lines.append(f"a JSON schema, {streams} at once: {plain:.2f} ms a token without, {bound:.2f} with it, {cost:+.1%}")
    return lines


def guesses(path: Path, threads: int) -> list[str]:
    """Giving code back with two methods renamed: tokens a second with and without guesses, the same text."""
    chat = [{"role": "user", "content": EDIT}]
    params = SamplingParams(temperature=0, max_tokens=EDIT_TOKENS)
    plain, guessing = (LLM(path, threads=threads, guesses=number) for number in (0, 32))
    speeds: dict[str, list[float]] = {"plain": [], "guessing": []}
    texts = set()
    for _ in range(ROUNDS):
        for name, llm in (("plain", plain), ("guessing", guessing)):
            (output,) = answers(llm, [chat], params)
            texts.add(output.text)
            speeds[name].append((output.usage.completion_tokens - 1) / output.timings.decode_seconds)
    assert len(texts) == 1, "guesses changed a text"
    a, b = (statistics.median(speeds[name]) for name in ("plain", "guessing"))
    return [f"editing code: {a:.1f} tokens/s, with guesses {b:.1f}, {b / a:.2f} times"]
