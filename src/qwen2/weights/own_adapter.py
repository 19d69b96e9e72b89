"""The adapter of a model of one's own (ADAPTER in a Modelfile): found, checked against the model, and copied into the store.

    adapter-0123456789abcdef/adapter_config.json, adapter_model.safetensors      in the model's folder, named by the files' digest

What lies beside the two and says how chats are written goes with them (adapter_texts.py). An adapter of llama.cpp, one GGUF file,
becomes such a folder (adapter_gguf.py). Left out: what the files say (adapter.py).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2.weights.adapter_texts import BESIDE, TEXTS
from qwen2.weights.folders import OF_RUN, link, link_adapter
from qwen2.weights.locks import make
from qwen2.weights.manifest import StoredFile
from qwen2.weights.partial import file_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qwen2.config import ModelConfig
    from qwen2.weights.manifest import StoredModel
    from qwen2.weights.store import Store

FILES = ("adapter_config.json", "adapter_model.safetensors")
OR_ONE = f"an adapter's files are {FILES[0]} and {FILES[1]}, or one .gguf"


GGUF = "adapter.gguf"  # an uploaded one


def given_adapter(store: Store, named: str | None, folder: Path | None, files: Mapping[str, str], work: Path) -> Path | None:
    """What ADAPTER names, a folder or a GGUF file seen from `folder`, or the uploaded `files`, digests by name; None for neither.

    Uploaded files get second names in `work`. Raises ValueError or FileNotFoundError in one line.
    """
    if named is not None and files:
        raise ValueError("adapters: the Modelfile has an ADAPTER already; leave one of them out")
    if files:
        return _uploaded(store, files, work)
    if named is None:
        return None
    path = (Path.cwd() if folder is None else folder) / Path(named).expanduser()
    if path.name in FILES:
        path = path.parent
    if not (path.is_file() if _is_gguf(named) else path.is_dir()):
        seen = "" if folder is None else f", seen from {folder}"
        raise FileNotFoundError(f"ADAPTER {named}: no such {'file' if _is_gguf(named) else 'folder'}{seen}; {OR_ONE}")
    return path / OF_RUN if not (path / FILES[0]).exists() and (path / OF_RUN / FILES[0]).is_file() else path


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _uploaded(store: Store, files: Mapping[str, str], work: Path) -> Path:
    alone = len(files) == 1 and _is_gguf(next(iter(files)))
    odd = None if alone else next((name for name in files if name not in (*FILES, *TEXTS, *BESIDE)), None)
    if odd is not None:
        raise ValueError(f"adapters: {odd[:80]!r}: {OR_ONE}")
    for name in files if alone else dict.fromkeys((*FILES, *files)):
        if name not in files:
            raise ValueError(f"adapters: {name} is missing; {OR_ONE}")
        place = store.blob(files[name])
        if place is None:
            raise ValueError(f"adapters: {name[:80]} is not uploaded yet: POST /api/blobs/sha256:{files[name]} first")
        link(place, work / (GGUF if alone else name))
    return work / GGUF if alone else work


def put(model: StoredModel, base: StoredModel, adapter: Path | None, config: ModelConfig, work: Path) -> StoredModel:
    """The model with the files of its adapter in `work`: copies, or those of what it is made from, which get second names.

    ValueError where both have one, and for an adapter of another model.
    """
    if adapter is None:
        link_adapter(base, work)
        return replace(model, adapter=base.adapter)
    if base.adapter:
        raise ValueError(f"ADAPTER: {base.name} has an adapter already, and a model has one: write FROM {base.source}, or merge it first")
    make(work / "adapter")
    if adapter.is_file():
        from qwen2.weights.adapter_gguf import to_folder

        to_folder(adapter, config, work / "adapter")
    check_fits(work / "adapter" if adapter.is_file() else adapter, config)
    found = []
    for name in FILES if adapter.is_file() else (*FILES, *(name for name in TEXTS if (adapter / name).exists())):
        place = work / "adapter" / name
        if not adapter.is_file():
            shutil.copyfile(adapter / name, place)
        found.append(StoredFile(name, place.stat().st_size, file_digest(place).hexdigest(), str(adapter)))
    model = replace(model, adapter=tuple(found))
    assert model.adapter_path is not None, "it has one now"
    (work / "adapter").rename(model.adapter_path)
    return model


def check_fits(adapter: Path, config: ModelConfig) -> None:
    """ValueError or FileNotFoundError in one line where the folder is no adapter of a model of this shape. No weights are read."""
    from qwen2.model import Qwen2
    from qwen2.weights.adapter import adapters_for, read_adapter

    adapters_for(Qwen2(config, device="meta"), replace(read_adapter(adapter), copies={}))
