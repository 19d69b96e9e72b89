"""How a server begins, with the port that it got, and how it ends: what is being written is finished; after a while, or at the next
Ctrl-C, it is broken off.

Who waits for an answer that is broken off hears so, in a stream by its last event. Another Ctrl-C waits for nobody. Pulls, and models
that are being made, end at once. Left out: loads, which no engine can break off; uvicorn cuts them when its own time is over.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import FrameType

    from qwen2.server.models import Models
    from qwen2.server.progress import Works

MOMENT = 0.1  # seconds between two looks


class Ending(uvicorn.Server):
    """A server that gives its answers so many seconds of `patience` when it is told to end."""

    def __init__(
        self, config: uvicorn.Config, models: Models, works: Works, patience: float, begun: Callable[[int], object] | None = None
    ) -> None:
        super().__init__(config)
        self.begun = begun
        self.models, self.works, self.patience = models, works, patience
        self.hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server, the second Ctrl-C what it writes, the third everything."""
        if self.should_exit and sig == signal.SIGINT and not self.hurried:
            self.hurried = True
        else:
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say at which port it listens when it does, also where any free one was asked for."""
        await super().startup(sockets)
        if self.started and self.begun is not None:
            self.begun(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what is being written, and say so."""
        self.works.end()
        count = sum(loaded.users for loaded in self.models.loaded.values())
        if count:
            told = f"finishing {count} answer{'s' if count > 1 else ''}; Ctrl-C again ends {'them' if count > 1 else 'it'}"
            print(f"qwen2: {told}", file=sys.stderr, flush=True)
        breaking = asyncio.ensure_future(self._break_off())
        try:
            await super().shutdown(sockets)
        finally:
            breaking.cancel()
            await asyncio.gather(breaking, return_exceptions=True)

    async def _break_off(self) -> None:
        begin = time.monotonic()
        while not self.hurried and time.monotonic() - begin < self.patience:
            await asyncio.sleep(MOMENT)
        while True:  # also what begins only now, behind a model that was being loaded
            for loaded in self.models.loaded.values():
                loaded.llm.abort()
            await asyncio.sleep(MOMENT)
