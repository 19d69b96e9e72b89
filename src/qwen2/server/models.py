"""Models in memory: loaded when first asked for, kept for a while after the last request, unloaded when another needs place or memory.

One whose weights are larger than what is free and what all others have is refused, and no other is given up for it.

Those of the same weights, by their digest, share them and one engine, each with settings and an adapter of its own; together they take
one place.
One that was made again under its name (`qwen2 create`) is loaded again when nobody uses it.

async with models.use("qwen2.5-coder:0.5b") as llm: ...
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from weakref import WeakSet

from qwen2.server.errors import ApiError
from qwen2.server.memory import sweep
from qwen2.server.threads import apart
from qwen2.weights.registry import ENTRIES, by_repository

if TYPE_CHECKING:
    from qwen2.engine.engine import Engine
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
    """Those of one server. `load` takes a name and gives an LLM, and what keeps its files there; it runs on a thread.

    `free` tells the bytes of memory that can still be taken, None where the system does not say.
    """

    def __init__(
        self, store: Store, load: Load, keep_alive: float | None, max_loaded: int, free: Callable[[], int | None] = lambda: None
    ) -> None:
        self.store, self._load, self._free = store, load, free
        self.keep_alive, self.max_loaded = keep_alive, max_loaded
        self.loaded: dict[str, Loaded] = {}
        self._changed = asyncio.Condition()
        self._loading: dict[str, asyncio.Task[Loaded]] = {}  # by the weights' digest
        self._unwanted: set[asyncio.Task[None]] = set()
        self._leaving: WeakSet[Engine] = WeakSet()  # unloaded, and gone as soon as nobody refers to them: their memory is as good as free
        self._sweeping: threading.Thread | None = None  # what was unloaded last

    def full_name(self, name: str) -> str:
        """The name of a model that is here. 404 where it is not; a path is not a name."""
        return self._stored(name).name

    def _stored(self, name: str) -> StoredModel:
        try:
            return self.store.get(name)
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
            stored = self._stored(full)
            alike = self._alike(stored)
            if self._is_outdated(stored):  # perhaps of the same weights, which then are kept for it
                self.unload(full)
            while full not in self.loaded:
                alike = self._alike(stored) if alike is None else alike
                if stored.digest not in self._loading and (alike is not None or self._has_place(stored)):
                    loading = self._loading[stored.digest] = asyncio.ensure_future(self._load_now(stored, alike))
                    break
                alike = None  # it may go meanwhile
                await self._changed.wait()
                stored = self._stored(full)
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

    def _is_outdated(self, stored: StoredModel) -> bool:
        """Whether another is in memory under its name, which was made again meanwhile, and nobody uses it."""
        there = self.loaded.get(stored.name)
        return there is not None and not there.users and there.stored != stored

    def _alike(self, stored: StoredModel) -> Loaded | None:
        """One in memory that has the same weights."""
        return next((one for one in self.loaded.values() if one.stored.digest == stored.digest), None)

    def _beside(self, alike: Loaded, stored: StoredModel) -> tuple[LLM, object]:
        hold = self.store.hold(stored.name)
        return alike.llm.beside(alike.llm.model.made_as(stored.name, stored.path, stored.made, hold, stored.adapter_path)), hold

    async def _load_now(self, stored: StoredModel, alike: Loaded | None) -> Loaded:
        """The model, for the one who asked first; on the weights of one that is `alike`."""
        full = stored.name
        try:
            start = time.monotonic()
            try:
                llm, hold = await apart(lambda: self._loaded_now(stored, alike))
            except (ValueError, OSError, RuntimeError) as error:  # it names files, which are no client's to know
                log.error("%s cannot be loaded: %s", full, error)
                raise ApiError(500, f"{full} cannot be loaded; the server's log says why", "model_not_loaded", "model") from None
            loaded = Loaded(stored, llm, hold, self.keep_alive, time.monotonic() - start, users=1)
            log.info("loaded %s in %.1f s%s", full, loaded.seconds, "" if alike is None else f", on the weights of {alike.name}")
            self.loaded[full] = loaded
            return loaded
        finally:
            async with self._changed:
                del self._loading[stored.digest]
                self._changed.notify_all()

    def _loaded_now(self, stored: StoredModel, alike: Loaded | None) -> tuple[LLM, object]:
        """On a thread: what was unloaded for it has gone before."""
        if self._sweeping is not None:
            self._sweeping.join()
        found = self._load(stored.name) if alike is None else self._beside(alike, stored)
        gc.freeze()  # a tokenizer is a million objects, which each search for garbage would visit
        return found

    def _has_place(self, stored: StoredModel) -> bool:
        """Make room for one more: of the weights that nobody uses those used longest ago go, with every model that has them.

        False: it has to wait for one that is used. ApiError: its weights are larger than all the memory there could be.
        """
        unused, free = self._unused(), self._free_for(stored)
        if free + sum(map(self._memory_of, unused)) < stored.size:  # nobody is given up for one that would have to wait after all
            return False
        while len({one.stored.digest for one in self.loaded.values()} | self._loading.keys()) >= self.max_loaded or free < stored.size:
            if not unused:
                return False
            digest = unused.pop(0)
            free += self._memory_of(digest)
            for name in [one.name for one in self.loaded.values() if one.stored.digest == digest]:
                self.unload(name)
        return True

    def _memory_of(self, digest: str) -> int:
        """What comes back when all that have these weights go."""
        return next(_memory(one.llm.engine) for one in self.loaded.values() if one.stored.digest == digest)

    def _unused(self) -> list[str]:
        """Digests of weights that nobody uses, those used longest ago first."""
        used = {one.stored.digest for one in self.loaded.values() if one.users} | self._loading.keys()
        last: dict[str, float] = {}
        for one in self.loaded.values():
            if one.stored.digest not in used:
                last[one.stored.digest] = max(last.get(one.stored.digest, 0.0), one.last_used)
        return sorted(last, key=lambda digest: last[digest])

    def _free_for(self, stored: StoredModel) -> float:
        """Bytes that are free, or will be in a moment. ApiError where even all that is loaded would not make room for the model."""
        there = {one.llm.engine for one in self.loaded.values()}
        told = self._free()
        if told is None:
            return math.inf
        free = told + sum(_memory(engine) for engine in self._leaving if engine not in there)
        could = free + sum(map(_memory, there))
        if could < stored.size and not self._loading:
            needs, has = stored.size / 1e9, could / 1e9
            cure = "take a smaller one, or one of fewer bits, or end other programs"
            log.error("%s does not fit: %.2f GB of weights, %.2f GB of memory", stored.name, needs, has)
            told_so = f"{stored.name} does not fit: its weights take {needs:.2f} GB and {has:.2f} GB of memory could be free for it: {cure}"
            raise ApiError(503, told_so, "model_too_large", "model")
        return free

    def sharing(self, loaded: Loaded) -> list[str]:
        """The other models in memory that have its weights."""
        return [one.name for one in self.loaded.values() if one is not loaded and one.llm.engine is loaded.llm.engine]

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
        self._leaving.add(loaded.llm.engine)
        log.info("unloaded %s", full)
        del loaded
        self._sweeping = threading.Thread(target=sweep, args=(bool(self.loaded),), name="sweep", daemon=True)
        self._sweeping.start()

    async def expire(self) -> None:
        """Unload what has not been used for its time; runs as long as the server."""
        while True:
            await asyncio.sleep(0.5)
            for error in await asyncio.gather(self._prepare(), self._expire(), return_exceptions=True):
                if error is not None:  # the next round comes all the same
                    log.error("keeping models in memory", exc_info=error)

    async def _expire(self) -> None:
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


def _memory(engine: Engine) -> int:
    """Bytes that come back when it goes."""
    return engine.weight_bytes + engine.cache_bytes
