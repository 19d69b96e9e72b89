"""Long work on a thread, told as lines of JSON while it goes on: pulls, and models that are made.

Leaving the loop stops the work at its next report, and waits for that.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse

from qwen2.server.errors import ApiError

if TYPE_CHECKING:
    from qwen2.weights.pull import Progress

    Watch = Callable[[Progress], None]
Json = dict[str, Any]


class LeftError(Exception):
    """The client has gone: the work ends, and what came so far stays for the next one."""


async def told(work: Callable[[Watch], object], line_of: Callable[[Progress], Json]) -> AsyncGenerator[Json, None]:
    """Reports as they come; the last is {"status": "success"}, or has an "error"."""
    loop, queue, left = asyncio.get_running_loop(), asyncio.Queue[Json | None](), threading.Event()

    def watch(progress: Progress) -> None:
        if left.is_set():
            raise LeftError
        loop.call_soon_threadsafe(queue.put_nowait, line_of(progress))

    def run() -> None:
        try:
            work(watch)
            last: Json | None = {"status": "success"}
        except (ValueError, OSError) as error:
            last = {"error": str(error)}
        except LeftError:
            last = None
        loop.call_soon_threadsafe(queue.put_nowait, last)

    working = asyncio.ensure_future(asyncio.to_thread(run))
    try:
        while (line := await queue.get()) is not None:
            yield line
            if "error" in line or line.get("status") == "success":
                break
    finally:
        left.set()
        await asyncio.shield(working)


async def respond(lines: AsyncGenerator[Json, None], stream: bool, status: int = 400) -> Response:
    """Lines as they come, or the last alone, which has this status where it is an error."""
    if stream:
        return StreamingResponse(_encoded(lines), media_type="application/x-ndjson")
    last: Json = {}
    async for line in lines:
        last = line
    if "error" in last:
        raise ApiError(status, last["error"])
    return JSONResponse(last)


async def _encoded(lines: AsyncGenerator[Json, None]) -> AsyncIterator[bytes]:
    async with aclosing(lines):
        async for line in lines:
            yield json.dumps(line).encode() + b"\n"
