"""A run's folder: settings, metrics, checkpoints, the tokenizer, the model; one process at a time, which a lock sees to.

`config.json` says what the run was started with. Whoever resumes it has to ask for the same, but for what may change (changes.py):
the first other field that differs is named.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qwen2.train.changes import FROM, changed, differences, with_end
from qwen2.weights.json_object import read_json

CONFIG = "config.json"
LOCK = ".lock"
NAME = re.compile(r"step-(\d{6,})")
WHERE = "relative"  # where the model that a run started from, or its shards, lie, seen from the run: no part of what the run is


class RunFolder:
    """The folder of one run, held until `close`. Raises ValueError where another process trains in it.

    Of several ranks of one run the `main` one holds it, and writes and checks what the run is. `anew`: how another run begins with
    this one's model, in the words of its command.
    """

    def __init__(self, path: Path, main: bool = True, anew: str = FROM) -> None:
        self.path, self.main, self.anew = path, main, anew
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: is a file, and a run is a folder; name another with --out")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / LOCK)
        if not main:
            return
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{path}: another run is training in this folder; wait for it, or name another with --out") from None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    def begin(self, config: Mapping[str, Mapping[str, Any]], resume: bool) -> list[str]:
        """Write what the run is, section by section; or, to resume, see that it is the same. Returns what changed and has to be said.

        FileExistsError where a new run would overwrite one, FileNotFoundError where there is none to resume, ValueError where the
        run was started with something else.
        """
        path = self.path / CONFIG
        if not self.main:
            return []
        if not resume:
            if path.exists():
                written_config(self.path)
                raise FileExistsError(f"{self.path}: holds a run already; go on with it by --resume, or name another folder with --out")
            if numbered(self.checkpoints):  # which this one's would be counted among
                raise FileExistsError(
                    f"{self.checkpoints}: checkpoints of a run whose {CONFIG} is gone; remove them, or name another folder with --out"
                )
            write_json(path, config)
            return []
        written = written_config(self.path)
        asked = json.loads(json.dumps(config))
        steps = asked.get("settings", {}).get("steps")
        for section in config:
            theirs = {name: value for name, value in written.get(section, {}).items() if name != WHERE}
            try:
                if section == "settings":
                    theirs = with_end(theirs, steps, steps_done(self.checkpoints), self.anew)
                found = differences({name: value for name, value in asked[section].items() if name != WHERE}, theirs)
            except ValueError as error:
                raise ValueError(f"{self.path}: {section}: {error}") from None
            if found:
                raise ValueError(
                    f"{self.path}: {section}: {found[0]}; resume it as it was started, or start another run from it: {self.anew}"
                )
        said = changed(asked.get("settings", {}), written.get("settings", {}))
        if asked.get("settings") != written.get("settings"):
            write_json(path, {**written, "settings": asked["settings"]})
        return said

    def close(self) -> None:
        """Let others train here."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def written_config(folder: Path, sections: Iterable[str] = ("settings",)) -> dict[str, Any]:
    """What config.json says of a run. FileNotFoundError where there is none to resume, ValueError where it is that of something else."""
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder}: no run to resume here ({CONFIG} is missing); leave --resume out to start one")
    written = read_json(path)
    for section in sections:
        if not isinstance(written.get(section), dict):
            raise ValueError(f"{path}: not that of a run (it has no {section!r}); name another folder with --out")
    return written


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a run by step, the newest last."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def steps_done(folder: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    found = numbered(folder)
    return step_of(found[-1]) if found else 0


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.partition("-")[2])


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Readable JSON under a temporary name, then renamed."""
    draft = _draft(path)
    draft.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def check_writable(path: Path) -> None:
    """Make a file's folder and see that the file can be written there, before the work that it is for. ValueError where it cannot."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _draft(path).touch()
        _draft(path).unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}; name another file") from None


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")
