"""One HTTP request's answers: the model held while they are written, their chunks in the order in which they come, events or a whole.

Whatever way it ends, the model is let go and what still runs is ended: also when the client goes away.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi.responses import StreamingResponse

from qwen2.server.errors import FAILURES, GONE, ApiError, Dialect, body, of_engine
from qwen2.server.streams import check_whole, room

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from fastapi import Request
    from starlette.types import Message, Receive, Scope, Send

    from qwen2.engine.asked import Asked
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Chunk, Output
    from qwen2.server.metrics import Metrics
    from qwen2.server.streams import Streams

SIGN_OF_LIFE = 10.0  # seconds without a byte, after which one is sent that means nothing: clients and proxies give up on silence
T = TypeVar("T")


class Answering:
    """Requests of one model; iterated once: (number of the request, chunk)."""

    def __init__(
        self,
        name: str,
        llm: LLM,
        asked: Sequence[Asked],
        streams: Streams,
        metrics: Metrics,
        held: AsyncExitStack,
        started: float,
        load_seconds: float,
    ) -> None:
        self.name, self.llm, self.asked = name, llm, asked
        self._streams, self._metrics, self._held = streams, metrics, held
        self.started, self.load_seconds = started, load_seconds  # a clock reading, and the part before the model was there
        self._left = {id(one.request): one.request.params.n for one in asked}  # answers without an end
        self._broke = False  # they end by an error, and not because their client has gone

    @property
    def has_tools(self) -> bool:
        """Whether chunks come with content and calls told apart."""
        return bool(self.asked[0].parsers)

    def at_end(self, call: Callable[[], object]) -> None:
        """Call this when the model is let go."""
        self._held.callback(call)

    async def close(self) -> None:
        """Let the model go; what has no end by then is counted."""
        left = sum(self._left.values())
        if left:
            unread = [one.request for one in self.asked if self._left[id(one.request)] == one.request.params.n]
            self._metrics.left(self.name, left, unread, "error" if self._broke else "gone")
            self._left.clear()
        await self._held.aclose()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Chunk]]:
        if len(self.asked) == 1:
            async for chunk in self._one(self.asked[0]):
                yield 0, chunk
            return
        queue: asyncio.Queue[tuple[int, Chunk] | asyncio.Future[None]] = asyncio.Queue()
        places = room(self.llm, self.asked[0].request.params.n)

        async def feed(number: int, asked: Asked) -> None:
            async with places:
                async for chunk in self._one(asked):
                    queue.put_nowait((number, chunk))

        tasks = [asyncio.ensure_future(feed(number, asked)) for number, asked in enumerate(self.asked)]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, tuple):
                    yield item
                else:
                    item.result()  # raises what its request ended with
                    left -= 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, asked: Asked) -> AsyncIterator[Chunk]:
        chunks = self._streams.run(self.llm, asked)
        try:
            async for chunk in chunks:
                self._metrics.saw(self.name, asked.request, chunk)
                self._left[id(asked.request)] -= chunk.output is not None
                check_whole(asked.request, chunk)
                yield chunk
        except (*FAILURES, ApiError):
            self._broke = True
            raise
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]


async def whole(answering: Answering) -> list[list[Output]]:
    """All outputs: of each request its samples, in order."""
    found: list[dict[int, Output]] = [{} for _ in answering.asked]
    async for number, chunk in answering:
        if chunk.output is not None:
            found[number][chunk.index] = chunk.output
    return [[outputs[index] for index in sorted(outputs)] for outputs in found]


async def collected(request: Request, answering: Answering) -> list[list[Output]]:
    """The same for a client that waits; ended as soon as it is gone."""
    try:
        return await unless_gone(request, whole(answering))
    finally:
        await answering.close()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What the work gives, unless the client leaves first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(GONE, "the client has gone")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events(objects: AsyncIterator[dict[str, Any]], dialect: Dialect, end: bytes) -> AsyncIterator[bytes]:
    """Objects as server-sent events, or as lines for Ollama; an error in the middle is the last of them (responses.py tells its own)."""
    frame = {"openai": _event, "responses": _named_event, "ollama": _line, "anthropic": _named_event}[dialect]
    try:
        async for one in objects:
            yield frame(one)
        yield end
    except (*FAILURES, ApiError) as error:
        yield frame(body(of_engine(error), dialect))
    finally:
        await objects.aclose()  # type: ignore[attr-defined]


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _json(value) + b"\n\n"


def _named_event(value: dict[str, Any]) -> bytes:
    return b"event: " + value["type"].encode() + b"\n" + _event(value)


def _line(value: dict[str, Any]) -> bytes:
    return _json(value) + b"\n"


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class EventsResponse(StreamingResponse):
    """A stream of an answer, never silent for long; the model is let go however it ends."""

    def __init__(self, answering: Answering, content: AsyncIterator[bytes], dialect: Dialect) -> None:
        kind = "application/x-ndjson" if dialect == "ollama" else "text/event-stream"
        super().__init__(content, media_type=kind, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.answering, self.content = answering, content
        self.sign = b" " if dialect == "ollama" else b": still at work\n\n"  # blanks before an object of JSON are part of none
        self.sent = 0  # messages, headers among them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            self.sent += 1
            await send(message)

        living = asyncio.ensure_future(self._live(send))
        try:
            await super().__call__(scope, receive, counted)
        finally:
            living.cancel()
            await asyncio.gather(living, return_exceptions=True)
            await self.content.aclose()  # type: ignore[attr-defined]
            await self.answering.close()

    async def _live(self, send: Send) -> None:
        """A sign of life whenever nothing was sent for a while: long prompts, and calls that are sent when they are whole."""
        while True:
            before = self.sent
            await asyncio.sleep(SIGN_OF_LIFE)
            if 0 < before == self.sent:
                await send({"type": "http.response.body", "body": self.sign, "more_body": True})
