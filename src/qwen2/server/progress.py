"""Long work told as lines of JSON while it goes on: pulls, models that are made, copies. Of each a few at once, one of a name; others wait.

Leaving the loop stops the work at its next report, and waits for that. It also stops when the server ends, which waits for none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from qwen2.server.answering import unless_gone
from qwen2.server.errors import ApiError
from qwen2.server.threads import apart

if TYPE_CHECKING:
    from qwen2.weights.pull import Progress

    Watch = Callable[[Progress], None]
Json = dict[str, Any]

log = logging.getLogger("qwen2.server")
Kind = Literal["pulled", "made", "copied"]
MOST = 4  # of a kind at once, each with a thread and, where it is a pull, with connections of its own
FAILED = {"error": "the server failed; its log says why"}
ENDING = {"error": "the server ends; what has come so far stays, and the next pull goes on there"}


class LeftError(Exception):
    """The client has gone: the work ends, and what came so far stays for the next one."""


class Works:
    """Those of one server: which run, which wait for a place, and how all are told to end."""

    def __init__(self) -> None:
        self.running: dict[str, Kind] = {}  # by the names of models
        self.ending = False
        self._waiting: dict[asyncio.Future[None], tuple[Kind, str]] = {}  # in the order in which they came
        self._leaving: set[Callable[[], None]] = set()

    async def told(
        self, kind: Kind, name: str, work: Callable[[Watch], object], line_of: Callable[[Progress], Json]
    ) -> AsyncGenerator[Json, None]:
        """Reports as they come; the last is {"status": "success"}, or has an "error"."""
        why = self._why_not(kind, name)
        if why is not None:
            yield {"status": why}
        await self._begin(kind, name)
        if self.ending:
            self._end(name)
            yield ENDING
            return
        async with aclosing(self._lines(name, work, line_of)) as lines:
            async for line in lines:
                yield line

    async def _lines(self, name: str, work: Callable[[Watch], object], line_of: Callable[[Progress], Json]) -> AsyncGenerator[Json, None]:
        loop, queue, left = asyncio.get_running_loop(), asyncio.Queue[Json | None](), threading.Event()
        last: Progress | None = None

        def watch(progress: Progress) -> None:
            nonlocal last
            if left.is_set():
                raise LeftError
            if progress != last:  # a wait says again and again that it waits
                last = progress
                loop.call_soon_threadsafe(queue.put_nowait, line_of(progress))

        def leave() -> None:
            left.set()
            queue.put_nowait(ENDING)

        working = asyncio.ensure_future(apart(lambda: work(watch), at_end=lambda: self._end(name)))
        working.add_done_callback(lambda done: queue.put_nowait(None if done.cancelled() else _last_line(name, done.exception())))
        self._leaving.add(leave)
        try:
            while (line := await queue.get()) is not None:
                yield line
                if "error" in line or line.get("status") == "success":
                    break
        finally:
            self._leaving.remove(leave)
            left.set()
            if not self.ending:
                await asyncio.wait({working})

    def end(self) -> None:
        """The server ends: clients hear so at once."""
        self.ending = True
        for leave in self._leaving:
            leave()
        self._admit()

    def _why_not(self, kind: Kind, name: str) -> str | None:
        """Why a work has to wait."""
        if name in self.running:
            return f"another client has asked for {name}: waiting for that"
        if list(self.running.values()).count(kind) >= MOST:
            return f"{MOST} models are being {kind} already: waiting for one of them"
        return None

    async def _begin(self, kind: Kind, name: str) -> None:
        """Wait for a place, and take it."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[place] = kind, name
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if self._waiting.pop(place, None) is None:  # it was given just now
                self._end(name)
            raise

    def _admit(self) -> None:
        for place, (kind, name) in list(self._waiting.items()):
            if self.ending or self._why_not(kind, name) is None:
                del self._waiting[place]
                self.running[name] = kind
                place.set_result(None)

    def _end(self, name: str) -> None:
        self.running.pop(name, None)
        self._admit()


def _last_line(name: str, error: BaseException | None) -> Json | None:
    """How a work ended: what is neither an answer nor the client's going is a bug, or lack of memory, and no client's to read."""
    if error is None:
        return {"status": "success"}
    if isinstance(error, LeftError):
        return None
    if isinstance(error, ValueError | OSError):
        return {"error": str(error)}
    log.error("%s: a pull, or the making of a model, broke off", name, exc_info=error)
    return FAILED


def without(text: str, home: str) -> str:
    """A message with what stands for the store's folder left out of its paths."""
    return " ".join(word.rpartition("/")[2] if home in word else word for word in text.split(" "))


async def respond(request: Request, lines: AsyncGenerator[Json, None], stream: bool, status: int = 400) -> Response:
    """Lines as they come, or the last alone, which has this status where it is an error."""
    if stream:
        return StreamingResponse(_encoded(lines), media_type="application/x-ndjson")
    last = await unless_gone(request, _last(lines))
    if "error" in last:
        raise ApiError({FAILED["error"]: 500, ENDING["error"]: 503}.get(last["error"], status), last["error"])
    return JSONResponse(last)


async def _last(lines: AsyncGenerator[Json, None]) -> Json:
    last: Json = {}
    async with aclosing(lines):
        async for line in lines:
            last = line
    return last


async def _encoded(lines: AsyncGenerator[Json, None]) -> AsyncIterator[bytes]:
    async with aclosing(lines):
        async for line in lines:
            yield json.dumps(line).encode() + b"\n"
