"""Models in memory: loaded when first asked for, kept for a while after the last request, unloaded when another needs the place.

One that was made again under its name (`qwen2 create`) is loaded again when nobody uses it.

async with models.use("qwen2.5-coder:0.5b") as llm: ...
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from qwen2.server.errors import ApiError
from qwen2.weights.registry import ENTRIES, by_repository

if TYPE_CHECKING:
    from qwen2.engine.llm import LLM
    from qwen2.weights.manifest import StoredModel
    from qwen2.weights.store import Store

log = logging.getLogger("qwen2.server")
Load = Callable[[str], "tuple[LLM, object]"]
REST = 1.0  # seconds without a request, after which a model is at rest
UNSAID = object()  # a request that does not say how long the model stays


@dataclass
class Loaded:
    """A model in memory, and who uses it."""

    stored: StoredModel  # as it was when it was loaded
    llm: LLM
    hold: object  # nobody removes a model that is served
    keep_alive: float | None
    seconds: float  # that loading took
    users: int = 0
    knows_forms: bool = False  # the data of constraints is made
    last_used: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """Its full name."""
        return self.stored.name

    def expires_at(self) -> float:
        """The same as a time of day."""
        assert self.expires is not None, "asked only where it goes"
        return time.time() + self.expires - time.monotonic()

    @property
    def expires(self) -> float | None:
        """Clock reading after which it goes; None while it is used, or where it stays."""
        return None if self.users or self.keep_alive is None else self.last_used + self.keep_alive


class Models:
    """Those of one server. `load` takes a name and gives an LLM, and what keeps its files there; it runs on a thread."""

    def __init__(self, store: Store, load: Load, keep_alive: float | None, max_loaded: int) -> None:
        self.store, self._load = store, load
        self.keep_alive, self.max_loaded = keep_alive, max_loaded
        self.loaded: dict[str, Loaded] = {}
        self._changed = asyncio.Condition()
        self._loading: dict[str, asyncio.Task[Loaded]] = {}
        self._unwanted: set[asyncio.Task[None]] = set()

    def full_name(self, name: str) -> str:
        """The name of a model that is here. 404 where it is not; a path is not a name."""
        try:
            return self.store.get(name).name
        except FileNotFoundError as error:
            raise ApiError(404, str(error), "model_not_found", "model") from None
        except ValueError:
            known = by_repository(name) if "/" in name else None
            hint = f": run qwen2 pull {name}" if name in ENTRIES or known is not None else ", and there is none of that name to pull"
            raise ApiError(
                404, f"model {name!r:.80} is not here{hint}; GET /v1/models lists those that are", "model_not_found", "model"
            ) from None

    @asynccontextmanager
    async def use(self, name: str, keep_alive: object = UNSAID) -> AsyncIterator[LLM]:
        """The model, loaded where it is not, and held while it is used. `keep_alive`: seconds that it stays then, None for good.

        What one request said holds for those after it that do not say it.
        """
        full = self.full_name(name)
        loaded = await self._get(full)
        try:
            yield loaded.llm
        finally:
            if keep_alive is not UNSAID:
                loaded.keep_alive = cast("float | None", keep_alive)
            await self._let_go(loaded)

    async def _let_go(self, loaded: Loaded) -> None:
        loaded.users -= 1
        loaded.last_used = time.monotonic()
        async with self._changed:
            self._changed.notify_all()

    async def _get(self, full: str) -> Loaded:
        async with self._changed:
            there = self.loaded.get(full)
            if there is not None and not there.users and there.stored != self.store.get(full):  # made again meanwhile
                self.unload(full)
            while full not in self.loaded:
                if full not in self._loading and self._has_place():
                    loading = self._loading[full] = asyncio.ensure_future(self._load_now(full))
                    break
                await self._changed.wait()
            else:
                self.loaded[full].users += 1
                return self.loaded[full]
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:  # its thread cannot be stopped, and others may wait for the model: when it is there it is free
            unwanted = asyncio.ensure_future(self._free_when_loaded(loading))
            self._unwanted.add(unwanted)
            unwanted.add_done_callback(self._unwanted.discard)
            raise

    async def _free_when_loaded(self, loading: asyncio.Task[Loaded]) -> None:
        with suppress(ApiError):  # it is in the log
            await self._let_go(await loading)

    async def _load_now(self, full: str) -> Loaded:
        """The model, for the one who asked first."""
        try:
            start = time.monotonic()
            stored = self.store.get(full)
            try:
                llm, hold = await asyncio.to_thread(self._load, full)
            except (ValueError, OSError, RuntimeError) as error:  # it names files, which are no client's to know
                log.error("%s cannot be loaded: %s", full, error)
                raise ApiError(500, f"{full} cannot be loaded; the server's log says why", "model_not_loaded", "model") from None
            loaded = Loaded(stored, llm, hold, self.keep_alive, time.monotonic() - start, users=1)
            log.info("loaded %s in %.1f s", full, loaded.seconds)
            self.loaded[full] = loaded
            return loaded
        finally:
            async with self._changed:
                del self._loading[full]
                self._changed.notify_all()

    def _has_place(self) -> bool:
        """Make room for one more: of those that nobody uses the one used longest ago goes."""
        while len(self.loaded) + len(self._loading) >= self.max_loaded:
            unused = [one for one in self.loaded.values() if not one.users]
            if not unused:
                return False
            self.unload(min(unused, key=lambda one: one.last_used).name)
        return True

    def leave(self, full: str) -> None:
        """Unload a model, if it is in memory, as soon as nobody uses it."""
        loaded = self.loaded.get(full)
        if loaded is not None and loaded.users:
            loaded.keep_alive = 0.0
        elif loaded is not None:
            self.unload(full)

    def unload(self, full: str) -> None:
        """Give a model's memory back; what it writes is broken off, and its thread ends when whoever waits for that has heard."""
        loaded = self.loaded.pop(full)
        loaded.llm.abort()
        log.info("unloaded %s", full)
        del loaded
        gc.collect()

    async def expire(self) -> None:
        """Unload what has not been used for its time; runs as long as the server."""
        while True:
            await asyncio.sleep(0.5)
            await self._prepare()
            now = time.monotonic()
            gone = [one.name for one in self.loaded.values() if one.expires is not None and one.expires <= now]
            for name in gone:
                self.unload(name)
            if gone:
                async with self._changed:
                    self._changed.notify_all()

    async def _prepare(self) -> None:
        """What the first constraint needs holds all threads of Python for a second: made while nobody is answered, if that can be."""
        for one in list(self.loaded.values()):
            if not one.knows_forms and not one.users and time.monotonic() - one.last_used > REST:
                one.knows_forms = True
                await asyncio.to_thread(one.llm.engine.grammars.vocabulary)
