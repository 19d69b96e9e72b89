"""Whether a token can be made: /health answers 503 until every model that the server was started with has written one.

A server that was given none loads models when they are asked for, and is well as soon as it answers. Left out: models that go from
memory later, since the next request brings them back.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import JSONResponse

from qwen2.engine.request import SamplingParams
from qwen2.server.errors import FAILURES, ApiError
from qwen2.server.guard import has_key

if TYPE_CHECKING:
    from qwen2.server.app import Server

log = logging.getLogger("qwen2.server")


class Readiness:
    """Of one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.waiting = list(server.settings.load)
        self.failed: str | None = None

    async def warm(self) -> None:
        """Load what the server was started with, and have each write a token."""
        for name in self.server.settings.load:
            try:
                async with self.server.models.use(name) as llm:
                    asked = llm.ask("a", SamplingParams(temperature=0, max_tokens=1))
                    async for _ in self.server.streams.run(llm, asked):
                        pass
                    await asyncio.to_thread(llm.engine.grammars.vocabulary)  # which the first constraint would wait for
            except (*FAILURES, ApiError, OSError) as error:
                self.failed = f"{name}: {error}"
                log.error("%s wrote no token: %s", name, error)
                return
            self.waiting.remove(name)

    def state(self) -> tuple[int, dict[str, object]]:
        """The status, and what is said with it."""
        loaded = sorted(self.server.models.loaded)
        if self.failed is not None:
            return 503, {"status": "failed", "models": loaded, "error": "a model cannot be loaded; the server's log says why"}
        if self.waiting:
            return 503, {"status": "loading", "models": loaded, "waiting": self.waiting}
        return 200, {"status": "ok", "models": loaded}


async def health(request: Request) -> JSONResponse:
    """Whether requests are answered with tokens. Which models there are is told only to those who may ask for them."""
    server = request.app.state.server
    status, said = server.readiness.state()
    if not has_key(server.settings.api_key, request.headers):
        said = {"status": said["status"]}
    return JSONResponse(said, status_code=status, headers={"Retry-After": "1"} if status == 503 else None)
