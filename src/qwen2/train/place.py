"""Which folders are runs, checkpoints and adapters, and where the model that a run started from lies. Knows no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2.train.folder import CONFIG, WHERE
from qwen2.weights.folders import OF_RUN
from qwen2.weights.json_object import read_json

ADAPTER = OF_RUN  # what a run of adapters leaves at its end
START = "start-adapter"  # the one that it went on with, where it did


def is_run(path: str | Path) -> bool:
    """Whether a folder is a run's, or a checkpoint in one."""
    path = Path(path)
    if (path / "state.json").exists():
        return True
    return (path / CONFIG).exists() and ((path / "checkpoints").is_dir() or "settings" in read_json(path / CONFIG))


def trains_adapters(run: str | Path) -> bool:
    """Whether a run's folder, or a checkpoint in one, is of a run that trains adapters."""
    path = Path(run)
    record = (path.absolute().parent.parent if (path / "state.json").exists() else path) / CONFIG
    return record.exists() and read_json(record).get("lora") is not None


def is_adapter(path: str | Path) -> bool:
    """Whether a folder is an adapter's (weights/adapter.py)."""
    return (Path(path) / "adapter_config.json").is_file()


def absolute(source: str) -> str:
    """A source that is a file or a folder here, seen from anywhere; a name of the store as it is."""
    return os.path.abspath(source) if Path(source).exists() else source


def origin(source: str | None, folder: Path) -> dict[str, str | None]:
    """What a folder's record says of the model that it came from: where that is, also as seen from the folder itself."""
    if source is None or not os.path.isabs(source):
        return {"model": source}
    return {"model": source, WHERE: os.path.relpath(source, folder.absolute())}


def found_again(record: Mapping[str, Any], folder: Path) -> str | None:
    """The source of a record in `folder`: where it lies now, if both were moved together; else where it was."""
    source: str | None = record.get("model")
    if WHERE in record and (folder / record[WHERE]).exists():
        return os.path.normpath(os.path.abspath(folder / record[WHERE]))
    return source


def source_of(given: str, record: Mapping[str, Any] | None, folder: Path) -> str:
    """A source that was named, as the record in `folder` has it where it is the same one, also by another way or in a moved tree."""
    if record is not None and {given, os.path.abspath(given)} & {record.get("model"), found_again(record, folder)}:
        return str(record["model"])
    return absolute(given)
