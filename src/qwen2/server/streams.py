"""Chunks from the engine's thread to the event loop: one call between threads a step, however many answers are streamed.

async for chunk in streams.run(llm, llm.ask(messages)): ...       # leaving the loop early aborts the request
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from qwen2.server.errors import FAILURES, ApiError

if TYPE_CHECKING:
    from qwen2.engine.asked import Asked
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Chunk, Request

log = logging.getLogger("qwen2.server")


def told(error: Exception) -> Exception:
    """What a request ended with, as those who answer it expect it; a bug is logged here and is no client's to read."""
    if isinstance(error, FAILURES):
        return error
    log.error("a step broke off", exc_info=error)
    return RuntimeError("the step broke off")


def check_whole(request: Request, chunk: Chunk) -> None:
    """ApiError where an answer was broken off by others than its client: it is half of one, and nobody may take it for a whole."""
    if chunk.finish_reason == "abort" and not request.aborted:
        raise ApiError(503, "the answer was broken off: its model was unloaded, or the server ends; ask again", "broken_off", retry_after=1)


def room(llm: LLM, samples: int = 1) -> asyncio.Semaphore:
    """For the requests that one client hands in together: three quarters of a batch, so that others find a place beside them."""
    return asyncio.Semaphore(max(1, llm.engine.scheduler.max_batch * 3 // 4 // samples))


class Streams:
    """Everybody on one event loop who waits for an engine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[int, tuple[Request, asyncio.Event]] = {}
        self._called = False
        self._notify = self._from_engine  # one object, so that an engine calls it once a step

    def _from_engine(self) -> None:
        """On an engine's thread: there is something for somebody."""
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._called = False
        for request, event in self._waiting.values():
            if request.outbox or request.finished:
                event.set()

    async def requests(self, llm: LLM, request: Request) -> AsyncIterator[Chunk]:
        """The request's chunks as they come. Raises what the engine raises; ends the request when it is left."""
        event = asyncio.Event()
        self._waiting[id(request)] = request, event
        request.notify = self._notify
        llm.engine.submit(request)
        try:
            over = False
            while not over:
                await event.wait()
                event.clear()
                over = request.finished  # before its outbox is looked at
                while request.outbox:
                    yield request.outbox.popleft()
                if request.error is not None:
                    raise told(request.error)
        finally:
            del self._waiting[id(request)]
            if not request.finished:
                llm.engine.abort(request)

    async def run(self, llm: LLM, asked: Asked) -> AsyncIterator[Chunk]:
        """The same, with content and calls told apart where tools were offered."""
        chunks = self.requests(llm, asked.request)
        try:
            async for chunk in chunks:
                yield asked.read(chunk)
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]
