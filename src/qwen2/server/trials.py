"""Forms that nobody has asked for lately: tried before they are used (engine/grammar.py), each once, one or two at a time.

A trial keeps a processor busy for up to three seconds, so a crowd of forms that do not compile would slow everybody's answers down.
Who asks for a form that is being tried waits for that trial; where many forms wait already, a further one is a 429.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from qwen2.engine.constraint import Constraint
from qwen2.engine.grammar import UntriedError, no_trials
from qwen2.server.answering import unless_gone
from qwen2.server.errors import ApiError
from qwen2.server.threads import apart

if TYPE_CHECKING:
    from fastapi import Request

    from qwen2.engine.llm import LLM

log = logging.getLogger("qwen2.server")
T = TypeVar("T")
AT_ONCE = min(2, max(1, (os.cpu_count() or 1) // 2))
MOST = 32  # that run or wait


class Trials:
    """Those of one server."""

    def __init__(self) -> None:
        self._going: dict[tuple[int, Constraint], asyncio.Task[None]] = {}
        self._wanting: Counter[tuple[int, Constraint]] = Counter()  # requests that wait for each
        self._places = asyncio.Semaphore(AT_ONCE)

    async def ask(self, request: Request, llm: LLM, ask: Callable[[LLM], T]) -> T:
        """What `ask` gives, on a thread; again when what it asks for has been tried. Raises as it does, and ApiError."""

        def without_trials() -> T:
            with no_trials():
                return ask(llm)

        while True:
            try:
                return await asyncio.to_thread(without_trials)
            except UntriedError as untried:
                await unless_gone(request, self._tried(untried))

    async def _tried(self, untried: UntriedError) -> None:
        key = id(untried.grammars), untried.constraint
        if key not in self._going:
            if len(self._going) >= MOST:
                told = f"{MOST} forms that are new here are being tried or wait for that: ask again"
                raise ApiError(429, told, "too_many_forms", retry_after=2)
            self._going[key] = asyncio.ensure_future(self._try(untried, key))
            self._going[key].add_done_callback(lambda done: self._end(key, done))
        self._wanting[key] += 1
        try:
            await asyncio.shield(self._going[key])  # others may wait for it, and the next one gets by with what it finds
        except OSError as error:
            log.error("a form cannot be tried: %s", error)
            raise ApiError(503, "forms cannot be tried just now; ask again, the server's log says why", retry_after=1) from None
        finally:
            self._wanting[key] -= 1
            self._wanting += Counter()  # without those at zero

    async def _try(self, untried: UntriedError, key: tuple[int, Constraint]) -> None:
        async with self._places:
            if self._wanting[key]:
                await apart(lambda: untried.grammars.tried(untried.constraint))

    def _end(self, key: tuple[int, Constraint], done: asyncio.Task[None]) -> None:
        del self._going[key]
        if not done.cancelled():
            done.exception()  # remembered, and raised for whoever still waits
