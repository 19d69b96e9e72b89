"""Folders of models: how one becomes visible, what its removal frees, and files elsewhere that are registered."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2.weights.locks import make
from qwen2.weights.manifest import MANIFEST, StoredFile, StoredModel, read_manifest
from qwen2.weights.partial import file_digest
from qwen2.weights.registry import SAFETENSORS

if TYPE_CHECKING:
    from collections.abc import Mapping


OF_RUN = "adapter"  # where the folder of a run of adapters has its own


def now() -> str:
    """Date and time as a manifest has them."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def publish(ready: StoredModel, folder: Path) -> None:
    """Make a model visible in a folder, in place of one that may be there: at any moment it is the one or the other.

    Files of the one that was there go; who has them open goes on with them.
    """
    there = read_manifest(folder)
    if there is None:
        ready.write()
        move(ready.folder, folder)
        return
    if ready.adapter_path is not None:  # equal names, equal files
        if (folder / ready.adapter_path.name).exists():
            shutil.rmtree(ready.adapter_path)
        else:
            os.replace(ready.adapter_path, folder / ready.adapter_path.name)
    part = there.part
    if ready.location is not None:
        part = None
    elif there.location is not None or _listed(there) != _listed(ready):
        part = secrets.token_hex(8)
        os.replace(ready.folder, folder / part)
    replace(ready, folder=folder, part=part).write()
    kept = {MANIFEST, *(() if ready.adapter_path is None else (ready.adapter_path.name,))}
    kept |= {*((part,) if part is not None else () if ready.location is not None else (file.path for file in ready.files))}
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _listed(model: StoredModel) -> list[tuple[str, str]]:
    return sorted((file.path, file.sha256) for file in model.files)


def move(ready: Path, folder: Path) -> None:
    """Make a finished folder visible, at once."""
    if folder.exists():  # without a manifest: not ours, and not a model
        shutil.rmtree(folder)
    while True:
        make(folder.parent)
        try:
            os.replace(ready, folder)
            return
        except FileNotFoundError:
            if not ready.exists():
                raise  # else the one above has just been removed as empty


def prune(*folders: Path) -> None:
    """Remove those of the folders that are empty. Who is about to put something into one makes it again (`make`, `move`)."""
    for folder in folders:
        with suppress(OSError):  # not empty, or not there
            folder.rmdir()


def link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        raise OSError(f"{source.parent}: its file system cannot give one file two names ({error.strerror}); use the first name") from error


def link_adapter(model: StoredModel, folder: Path) -> None:
    """Give the files of a model's adapter, if it has one, second names in the folder of another."""
    if model.adapter_path is not None:
        make(folder / model.adapter_path.name)
        for file in model.adapter:
            link(model.adapter_path / file.path, folder / model.adapter_path.name / file.path)


def freed_bytes(folder: Path) -> int:
    """What removing the folder frees: files with a second name elsewhere stay."""
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def register(path: Path, digests: Mapping[str, str] | None = None) -> StoredModel:
    """A manifest for a GGUF file or a Hugging Face folder that stays where it is; `digests` of its files by name, where known."""
    path = path.absolute()
    if path.is_file():
        paths = [path]
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ValueError(f"{path}: not a GGUF file; give a .gguf file or a folder with config.json and *.safetensors")
    else:
        paths = sorted(one for one in path.iterdir() if one.is_file() and any(fnmatchcase(one.name, wanted) for wanted in SAFETENSORS))
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise ValueError(f"{path}: an adapter, and no model: name it in ADAPTER, beside FROM with the model that it is for")
        if (path / OF_RUN / "adapter_config.json").exists():  # a run of adapters
            raise ValueError(f"{path}: a run, and no model: name {path / OF_RUN} in ADAPTER, beside FROM with the model that it is for")
        if not {"config.json"} <= {one.name for one in paths} or not any(one.suffix == ".safetensors" for one in paths):
            raise ValueError(f"{path}: a model's folder holds config.json and *.safetensors")
    known = {} if digests is None else digests
    files = tuple(StoredFile(one.name, one.stat().st_size, known.get(one.name) or file_digest(one).hexdigest(), str(path)) for one in paths)
    kind, base = ("GGUF", path.parent) if path.is_file() else ("safetensors", path)
    return StoredModel("", kind, "not stated", str(path), now(), files, base, str(base))
