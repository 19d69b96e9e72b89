"""Clients of a server: each sends a chat and notes when its tokens come; together they arrive as public load generators let them.

Two patterns, those of vLLM's `bench serve`: so many clients, each asking again when it has its answer (`--max-concurrency`), and
arrivals of a Poisson process (`--request-rate`, burstiness 1). Plain sockets and as little work for each token as can be, since
clients share the machine with the server. Left out: what is asked (serve.py).
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

LINE = 1 << 20  # bytes of an event, at most
BEGUN = 8  # texts after which a stream is running


@dataclass
class Heard:
    """One answer as its client saw it."""

    asked: float = 0.0
    times: list[float] = field(default_factory=list)  # of the events that brought text
    ended: float = 0.0
    prompt: int = 0
    cached: int = 0
    tokens: int = 0
    text: str = ""

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.times[0] - self.asked

    def pauses(self, since: float, until: float) -> list[float]:
        """Between texts, as far as they lie in a stretch of time."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False) if b > since and a < until]


async def ask(port: int, body: dict[str, Any], heard: Heard | None = None) -> Heard:
    """A streamed chat, noted in `heard` where one is given. SystemExit with what the server said where it refuses."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LINE)
    body = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, **body}
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    heard = Heard() if heard is None else heard
    heard.asked = time.perf_counter()
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            raise SystemExit(f"port {port}: {status.decode().strip()} {(await reader.read()).decode()[-500:]}")
        async for line in reader:
            if line.startswith(b"data: {"):
                _event(heard, json.loads(line[6:]))
    finally:
        writer.close()
    heard.ended = time.perf_counter()
    if not heard.times or not heard.tokens:
        raise SystemExit(f"port {port}: an answer without text or usage")
    return heard


def _event(heard: Heard, event: dict[str, Any]) -> None:
    if "error" in event:
        raise SystemExit(f"the server ended an answer: {event['error']}")
    text = event["choices"][0]["delta"].get("content") if event["choices"] else None
    if text:
        heard.times.append(time.perf_counter())
        heard.text += text
    usage = event.get("usage")
    if usage:
        heard.prompt, heard.tokens = usage["prompt_tokens"], usage["completion_tokens"]
        heard.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


async def clients(port: int, bodies: Sequence[dict[str, Any]], number: int) -> list[Heard]:
    """So many clients share the requests; each asks for the next when it has its answer."""
    left, heard = list(reversed(bodies)), list[Heard]()

    async def client() -> None:
        while left:
            heard.append(await ask(port, left.pop()))

    await _together([client() for _ in range(number)])
    return heard


async def arrivals(port: int, bodies: Sequence[dict[str, Any]], rate: float, seed: int) -> list[Heard]:
    """Requests come at random, so many a second on average, whether or not earlier ones are answered."""
    random_ = random.Random(seed)
    waits = [random_.expovariate(rate) for _ in bodies]

    async def client(body: dict[str, Any], wait: float) -> Heard:
        await asyncio.sleep(wait)
        return await ask(port, body)

    at, starts = 0.0, []
    for wait in waits:
        at += wait
        starts.append(at)
    return await _together([client(body, start) for body, start in zip(bodies, starts, strict=True)])


async def intrusion(port: int, streams: Sequence[dict[str, Any]], long: dict[str, Any]) -> tuple[float, float]:
    """A long prompt amid streams: the longest pause of any of them while it is read, and the seconds to its own first text."""
    running = [Heard() for _ in streams]
    tasks = [asyncio.ensure_future(ask(port, body, heard)) for body, heard in zip(streams, running, strict=True)]
    try:
        while min(len(heard.times) for heard in running) < BEGUN:
            await _unless_over(tasks, asyncio.sleep(0.05))
        heard = await _unless_over(tasks, ask(port, long))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return max(pause for one in running for pause in one.pauses(heard.asked, heard.times[0])), heard.first


async def _unless_over(streams: Sequence[asyncio.Task[Heard]], work: Awaitable[Any]) -> Any:
    done = await work
    for stream in streams:
        if stream.done():
            stream.result()
            raise SystemExit("a stream ended before the long prompt was read: give streams more tokens")
    return done


async def _together(work: Sequence[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*work))


def rate(heard: Sequence[Heard]) -> float:
    """Tokens a second of all together, from the first request to the last answer."""
    return sum(one.tokens for one in heard) / (max(one.ended for one in heard) - min(one.asked for one in heard))


def percentile(values: Sequence[float], share: float) -> float:
    """With so many values that it is one of them, the smallest that so large a share does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def middle(values: Sequence[float]) -> float:
    return statistics.median(values)
