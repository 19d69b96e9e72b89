"""What the store knows of a model: one manifest.json beside its files, or in place of them for files that stay where they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen2.weights.modelfile import UNCHANGED, Modelfile

MANIFEST = "manifest.json"
VERSION = 1
PART = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class StoredFile:
    """One file of a model that is there."""

    path: str
    size: int
    sha256: str
    source: str


@dataclass(frozen=True)
class StoredModel:
    """A model that is there: what `qwen2 list` shows. `location` is set where the files lie outside the store.

    `made` is what it changes of its weights' own defaults, `part` the folder inside `folder` that has its files, where they were
    made again since it has its name. `adapter`: the files of its adapter, which lie in the store wherever those of its weights do.
    """

    name: str
    format: str
    licence: str
    source: str
    pulled: str  # date and time, ISO 8601, UTC
    files: tuple[StoredFile, ...]
    folder: Path
    location: str | None = None
    part: str | None = None
    made: Modelfile = UNCHANGED
    adapter: tuple[StoredFile, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in (*self.files, *self.adapter))

    @property
    def adapter_path(self) -> Path | None:
        """The folder of its adapter, in PEFT's form; None where it has none."""
        return self.folder / f"adapter-{_digest(self.adapter)[:16]}" if self.adapter else None

    @property
    def base(self) -> Path:
        """The folder that its files lie in."""
        return self.folder / (self.part or "") if self.location is None else Path(self.location)

    @property
    def path(self) -> Path:
        """What `load` takes: the GGUF file where there is one, else the folder."""
        if len(self.files) == 1 and self.files[0].path.endswith(".gguf"):
            return self.base / self.files[0].path
        return self.base

    @property
    def gone(self) -> bool:
        """Whether files are missing, as when one outside the store was moved."""
        own = [self.adapter_path / file.path for file in self.adapter] if self.adapter_path is not None else []
        return not all(path.exists() for path in (*(self.base / file.path for file in self.files), *own))

    @property
    def digest(self) -> str:
        """The sha256 of the one file, or of the list of all files' digests: equal digests, equal weights, whatever their adapters."""
        return self.files[0].sha256 if len(self.files) == 1 else _digest(self.files)

    @property
    def adapter_digest(self) -> str | None:
        """The same of its adapter's files; None where it has none."""
        return _digest(self.adapter) if self.adapter else None

    def write(self) -> None:
        """Put the manifest into the model's folder, as a whole or not at all."""
        values = {"version": VERSION, **asdict(self), "made": self.made.to_json()}
        del values["folder"]
        later = ("part", "made", "adapter")  # left out where there are none, as before there were any
        values = {key: value for key, value in values.items() if key not in later or value}
        draft = self.folder / f"{MANIFEST}.draft"
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.folder / MANIFEST)


def _digest(files: tuple[StoredFile, ...]) -> str:
    listed = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda file: file.path))
    return hashlib.sha256(listed.encode()).hexdigest()


def read_manifest(folder: Path) -> StoredModel | None:
    """The model in `folder`; None where there is none. A manifest that cannot be read is a ValueError that names it."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            raise ValueError("written by another version of qwen2")
        files, adapter = (tuple(StoredFile(**file) for file in found) for found in (values.pop("files"), values.pop("adapter", ())))
        made = Modelfile.from_json(values.pop("made", {}))
        if (part := values.get("part")) is not None and PART.fullmatch(part) is None:
            raise ValueError(f"part {part!r}")
        return StoredModel(**values, files=files, folder=folder, made=made, adapter=adapter)
    except FileNotFoundError:  # it went just now
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest of this program ({error}); remove the folder and pull the model again") from None
