"""What the store knows of a model: one manifest.json beside its files, or in place of them for files that stay where they are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class StoredFile:
    """One file of a model that is there."""

    path: str
    size: int
    sha256: str
    source: str


@dataclass(frozen=True)
class StoredModel:
    """A model that is there: what `qwen2 list` shows. `location` is set where the files lie outside the store."""

    name: str
    format: str
    licence: str
    source: str
    pulled: str  # date and time, ISO 8601, UTC
    files: tuple[StoredFile, ...]
    folder: Path
    location: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def path(self) -> Path:
        """What `load` takes: the GGUF file where there is one, else the folder."""
        base = self.folder if self.location is None else Path(self.location)
        if len(self.files) == 1 and self.files[0].path.endswith(".gguf"):
            return base / self.files[0].path
        return base

    @property
    def gone(self) -> bool:
        """Whether files are missing, as when one outside the store was moved."""
        base = self.folder if self.location is None else Path(self.location)
        return not all((base / file.path).exists() for file in self.files)

    @property
    def digest(self) -> str:
        """The sha256 of the one file, or of the list of all files' digests: equal digests, equal weights."""
        if len(self.files) == 1:
            return self.files[0].sha256
        listed = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(self.files, key=lambda file: file.path))
        return hashlib.sha256(listed.encode()).hexdigest()

    def write(self) -> None:
        """Put the manifest into the model's folder."""
        values = {"version": VERSION, **asdict(self)}
        del values["folder"]
        (self.folder / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> StoredModel | None:
    """The model in `folder`; None where there is none. A manifest that cannot be read is a ValueError that names it."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            raise ValueError("written by another version of qwen2")
        files = tuple(StoredFile(**file) for file in values.pop("files"))
        return StoredModel(**values, files=files, folder=folder)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest of this program ({error}); remove the folder and pull the model again") from None
