"""The bytes of one file that have arrived so far, and their running digest: what survives an interruption.

Bytes are only appended, so that any source can go on where another stopped; after a kill the digest is taken anew over what is
there, and the whole file is checked against its sha256 before it gets its name.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from qwen2.weights.registry import File

CHUNK = 1 << 20


class WrongFileError(ValueError):
    """The bytes are all there, and they are another file's."""


class Partial:
    """A file under way at `<path>.partial`. A file whose digest is not known in advance starts from nothing each time."""

    def __init__(self, folder: Path, file: File) -> None:
        self.file = file
        self.path = folder / f"{file.path}.partial"
        self._stream = self.path.open("ab" if file.sha256 is not None else "wb")
        self.size = self.path.stat().st_size
        self._digest = file_digest(self.path)
        self.rewind(min(self.size, file.size))

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def append(self, data: bytes) -> None:
        """Add the next bytes; more than the file has is a ValueError, since then it is another file."""
        if self.size + len(data) > self.file.size:
            raise ValueError(f"sends more than the {self.file.size} bytes of {self.file.path}")
        self._stream.write(data)
        self._digest.update(data)
        self.size += len(data)

    def rewind(self, size: int) -> None:
        """Forget everything behind the first `size` bytes."""
        if size == self.size:
            return
        self._stream.flush()
        self._stream.truncate(size)
        self._digest = file_digest(self.path)
        self.size = size

    def flush(self) -> None:
        """Put what has arrived on the disk, so that a finished part outlives a power cut."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def finish(self) -> str:
        """Give the file its name and return its sha256; a WrongFileError, and the bytes are gone, where it is not the one expected."""
        self.flush()
        digest = self._digest.hexdigest()
        self._stream.close()
        if self.size != self.file.size or self.file.sha256 not in (None, digest):
            self.path.unlink()
            expected = str(self.file.sha256)[:12]
            raise WrongFileError(f"{self.file.path} is not the file it should be: sha256 {digest[:12]}..., expected {expected}...")
        os.replace(self.path, self.path.with_suffix(""))
        return digest


def file_digest(path: Path) -> hashlib._Hash:
    """The sha256 of what lies at `path`."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(CHUNK):
            digest.update(data)
    return digest
