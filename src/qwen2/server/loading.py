"""How a model of the store is loaded for a server: on which weights, beside which draft, and with how much memory for its cache.

Weights are in memory once: a draft is that of the other engines, or a model that is served, and the other way round. A draft that
cannot guess for a model is told apart by headers, before it is loaded; that model is served without, and the log says so.

    load = Loader(settings, store); llm, hold = load("qwen2.5-coder:0.5b")
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from qwen2 import kernels
from qwen2.engine.memory import free_memory
from qwen2.weights.model import load, open_files

if TYPE_CHECKING:
    from qwen2.engine.engine import Engine
    from qwen2.engine.llm import LLM
    from qwen2.server.settings import Settings
    from qwen2.weights.manifest import StoredModel
    from qwen2.weights.model import Model
    from qwen2.weights.store import Store

log = logging.getLogger("qwen2.server")
KEPT = 1 << 30  # bytes of ended texts, which many clients come back to


class Loader:
    """Loads one model at a time: how much memory is free is asked when all that was loaded before has its own."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self._made: WeakKeyDictionary[Engine, dict[str, Model]] = WeakKeyDictionary()  # weights in memory by digest, held by none of these
        self._turn = threading.Lock()

    def __call__(self, name: str) -> tuple[LLM, object]:
        """The model, and what keeps its files there."""
        with self._turn:
            return self._load(name)

    def _load(self, name: str) -> tuple[LLM, object]:
        from qwen2.engine.llm import LLM

        settings, stored = self.settings, self.store.get(name)
        values: dict[str, Any] = {"device": settings.device, "threads": settings.threads, "cache_bits": settings.cache_bits}
        values |= {"context": settings.context, "max_batch": settings.max_batch, "cache_bytes": settings.cache_bytes}
        values["keep_bytes"] = KEPT if settings.cache_bytes is None else settings.cache_bytes
        kernels.select_isa(settings.isa)
        model = self._weights(stored)
        draft = None if settings.draft is None else self._draft(self.store.get(settings.draft), stored, model)
        free = free_memory(settings.device)
        if free is not None:  # others' caches may still grow
            free = max(0, free - sum(engine.cache_limit_bytes - engine.cache_bytes for engine in self._made))
        llm = LLM(model, draft=draft, free_bytes=free, **values)
        self._made[llm.engine] = {stored.digest: replace(model, hold=None)}
        if draft is not None:
            self._made[llm.engine][self.store.get(draft.name).digest] = replace(draft, hold=None)
        _say_cache(name, llm, free)
        return llm, (model.hold, None if draft is None else draft.hold)

    def _there(self, stored: StoredModel) -> Model | None:
        """A model of these weights that is in memory."""
        return next((models[stored.digest] for models in list(self._made.values()) if stored.digest in models), None)

    def _weights(self, stored: StoredModel) -> Model:
        """The model, on weights that are in memory where they are."""
        there = self._there(stored)
        if there is None:
            return load(stored.name, device=self.settings.device, home=self.store.home, packed=True)
        return there.made_as(stored.name, stored.path, stored.made, self.store.hold(stored.name), stored.adapter_path)

    def _draft(self, small: StoredModel, large: StoredModel, model: Model) -> Model | None:
        """The draft where it can guess for the model."""
        if small.digest == large.digest:
            return None
        there, free, why = self._there(small), free_memory(self.settings.device), ""
        if small.adapter:
            why = "has an adapter, which is none for"
        elif small.size >= large.size:
            why = "is not smaller than"
        elif there is not None:
            why = "" if model.tokenizer.same_tokens(there.tokenizer) else "has other tokens than"
        elif free is not None and free < small.size:
            why = "does not fit into memory beside"
        else:
            with open_files(small.path) as opened:
                why = "" if model.tokenizer.same_tokens(opened.tokenizer) else "has other tokens than"
        if why:
            log.warning("the draft %s %s %s: served without it", small.name, why, large.name)
            return None
        return self._weights(small)


def _say_cache(name: str, llm: LLM, free: int | None) -> None:
    """What its cache may take, and where that is more than there is."""
    most, tokens = llm.engine.cache_limit_bytes, llm.engine.cache_limit_tokens
    log.info("%s: keys and values of at most %s tokens, %.2f GB (--cache-gb)", name, f"{tokens:,}", most / 1e9)
    if free is not None and most > free:
        log.warning("%s: that is more than the %.2f GB of memory that are free: give a smaller --context or --cache-gb", name, free / 1e9)
