"""The adapter of a model of one's own (ADAPTER in a Modelfile): found, checked against the model, and copied into the store.

    adapter-0123456789abcdef/adapter_config.json, adapter_model.safetensors      in the model's folder, named by the files' digest

Left out: what the files say (adapter.py), and adapters of llama.cpp, in GGUF.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2.weights.folders import link, link_adapter
from qwen2.weights.locks import make
from qwen2.weights.manifest import StoredFile
from qwen2.weights.partial import file_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qwen2.config import ModelConfig
    from qwen2.weights.manifest import StoredModel
    from qwen2.weights.store import Store

FILES = ("adapter_config.json", "adapter_model.safetensors")
GGUF = "an adapter in GGUF is not read here: give the folder that it was made from, with adapter_config.json in it"


def given_adapter(store: Store, named: str | None, folder: Path | None, files: Mapping[str, str], work: Path) -> Path | None:
    """The folder that ADAPTER names, seen from `folder`, or `work` with the uploaded `files`, digests by name; None for neither.

    Raises ValueError or FileNotFoundError in one line.
    """
    if named is not None and files:
        raise ValueError("adapters: the Modelfile has an ADAPTER already; leave one of them out")
    if files:
        return _uploaded(store, files, work)
    if named is None:
        return None
    path = (Path.cwd() if folder is None else folder) / Path(named).expanduser()
    if named.lower().endswith(".gguf"):
        raise ValueError(f"ADAPTER {named}: {GGUF}")
    if path.name in FILES:
        path = path.parent
    if not path.is_dir():
        seen = "" if folder is None else f", seen from {folder}"
        raise FileNotFoundError(f"ADAPTER {named}: no such folder{seen}; it has the files {' and '.join(FILES)}")
    return path


def _uploaded(store: Store, files: Mapping[str, str], work: Path) -> Path:
    odd = next((name for name in files if name not in FILES), None)
    if odd is not None:
        why = GGUF if odd.lower().endswith(".gguf") else f"an adapter's files are {' and '.join(FILES)}"
        raise ValueError(f"adapters: {odd[:80]!r}: {why}")
    for name in FILES:
        if name not in files:
            raise ValueError(f"adapters: {name} is missing; an adapter's files are {' and '.join(FILES)}")
        place = store.blob(files[name])
        if place is None:
            raise ValueError(f"adapters: {name} is not uploaded yet: POST /api/blobs/sha256:{files[name]} first")
        link(place, work / name)
    return work


def put(model: StoredModel, base: StoredModel, adapter: Path | None, config: ModelConfig, work: Path) -> StoredModel:
    """The model with the files of its adapter in `work`: a folder's, copied, or those of what it is made from, which get second names.

    ValueError where both have one, and for an adapter of another model.
    """
    if adapter is None:
        link_adapter(base, work)
        return replace(model, adapter=base.adapter)
    if base.adapter:
        raise ValueError(f"ADAPTER: {base.name} has an adapter already, and a model has one: write FROM {base.source}, or merge it first")
    check_fits(adapter, config)
    make(work / "adapter")
    found = []
    for name in FILES:
        shutil.copyfile(adapter / name, work / "adapter" / name)
        size = (work / "adapter" / name).stat().st_size
        found.append(StoredFile(name, size, file_digest(work / "adapter" / name).hexdigest(), str(adapter)))
    model = replace(model, adapter=tuple(found))
    assert model.adapter_path is not None, "it has one now"
    (work / "adapter").rename(model.adapter_path)
    return model


def check_fits(adapter: Path, config: ModelConfig) -> None:
    """ValueError or FileNotFoundError in one line where the folder is no adapter of a model of this shape. No weights are read."""
    from qwen2.model import Qwen2
    from qwen2.weights.adapter import adapters_for, read_adapter

    adapters_for(Qwen2(config, device="meta"), replace(read_adapter(adapter), copies={}))
