"""Files that clients upload before they make a model of them, named by their sha256.

    blobs/sha256-<64 hex digits>        whole and verified
    blobs/<random>.upload               on its way

What was not made a model of in a day, and what a killed server left, goes at the next start of one (`sweep`).

A file that a model of the store has is found too, so nothing is uploaded twice. Left out: HTTP (server/ollama_create.py).

    upload = Blobs(home).upload(parse_digest("sha256:...")); upload.append(data); upload.finish()
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from typing import TYPE_CHECKING

from qwen2.weights.partial import WrongFileError
from qwen2.weights.pull import MARGIN, human_size

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})", re.ASCII)
UNUSED_SECONDS = 24 * 3600.0  # how long a file waits for a model to be made of it


def parse_digest(text: str) -> str:
    """The 64 digits of `sha256:...`; ValueError for everything else."""
    found = DIGEST.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:80]!r} is no digest: write sha256: and 64 digits of 0-9 and a-f")
    return found[1]


class Blobs:
    """Those of one home folder. Any number of processes may use them at once."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "blobs"

    def path(self, digest: str) -> Path:
        """Where the file of that digest lies, or would."""
        return self.folder / f"sha256-{parse_digest(f'sha256:{digest}')}"

    def upload(self, digest: str, size: int | None = None) -> Upload:
        """A file on its way; with its size, OSError where the disk has no room for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if size is not None and size > free - MARGIN:
            raise OSError(f"not enough space: the file has {human_size(size)}, and {human_size(max(0, free - MARGIN))} are free")
        return Upload(self.folder / f"{secrets.token_hex(16)}.upload", self.path(digest), digest)

    def sweep(self) -> None:
        """Remove files that no model was made of in a day, and what interrupted uploads left."""
        if not self.folder.is_dir():
            return
        oldest = time.time() - UNUSED_SECONDS
        for path in self.folder.iterdir():
            try:
                if path.is_file() and path.stat().st_mtime < oldest:
                    path.unlink()
            except FileNotFoundError:  # another server's sweep was faster
                continue


class Upload:
    """One file on its way to the disk. `close` removes what did not get to its name."""

    def __init__(self, draft: Path, path: Path, digest: str) -> None:
        self.draft, self.path, self.digest = draft, path, digest
        self.size = 0
        self._stream = draft.open("xb")
        self._running = hashlib.sha256()

    def append(self, data: bytes) -> None:
        """The next bytes."""
        self._stream.write(data)
        self._running.update(data)
        self.size += len(data)

    def finish(self, data: bytes = b"") -> None:
        """The last bytes; the file gets its name. WrongFileError, a ValueError, where the bytes are not those of the digest."""
        self.append(data)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        had = self._running.hexdigest()
        if had != self.digest:
            raise WrongFileError(f"the {self.size:,} bytes that came have the digest sha256:{had}, not sha256:{self.digest}")
        os.replace(self.draft, self.path)

    def close(self) -> None:
        """Put away what is not finished; after `finish` there is nothing."""
        self._stream.close()
        self.draft.unlink(missing_ok=True)
