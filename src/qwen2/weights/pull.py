"""Bring the files of one model into a folder: plan, check the space, fetch, verify. Interrupted, it goes on where it stopped.

The caller holds the model's lock. What is left out: where the folder ends up and when it is seen (`store.py`).
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwen2.weights import package_index
from qwen2.weights.manifest import StoredFile
from qwen2.weights.partial import Partial, WrongFileError, file_digest
from qwen2.weights.registry import ENTRIES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from qwen2.weights.registry import Entry, File
    from qwen2.weights.sources import FileSource

WEIGHTS = (".gguf", ".safetensors")
MARGIN = 32 << 20  # bytes left free for the rest of the system


@dataclass(frozen=True)
class Progress:
    """How far a pull is, in bytes; `note` is a line for people, and then nothing has moved."""

    done: int
    total: int
    note: str = ""


@dataclass
class Pull:
    """One pull under way. `done` only grows, even where a source makes a file start over."""

    home: Path
    entry: Entry
    sources: Sequence[FileSource]
    watch: Callable[[Progress], None]
    done: int = 0
    total: int = 0
    planned: tuple[File, ...] = ()
    giver: str = ""  # the source whose bytes came last
    unreachable: dict[str, str] = field(default_factory=dict)

    def run(self, folder: Path) -> tuple[StoredFile, ...]:
        """Fetch every file into a folder below `folder`, named by what is fetched, and return what came from where."""
        self.planned = self._plan()
        into = self.folder(folder)
        into.mkdir(parents=True, exist_ok=True)
        package_index.clean(into)
        self.total = sum(file.size for file in self.planned)
        self._check_space(into)
        stored, before = [], 0
        try:
            for file in self.planned:
                stored.append(self._file(into, file, before))
                before += file.size
                self._advance(before)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"disk full while pulling {self.entry.name}: {human_size(self.done)} of {human_size(self.total)} are kept; "
                f"free {human_size(self.total - self.done)} below {self.home} and run qwen2 pull {self.entry.name} again"
            ) from error
        return tuple(stored)

    def folder(self, folder: Path) -> Path:
        """Other weights, another folder: bytes of different files never meet."""
        identity = "".join(f"{file.path} {file.size} {file.sha256 if file.path.endswith(WEIGHTS) else ''}\n" for file in self.planned)
        return folder / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def _plan(self) -> tuple[File, ...]:
        """Which files, of which size: known in advance, or as the first source that answers lists them."""
        if self.entry.known is not None:
            return (self.entry.known,)
        reasons = []
        for source in self.sources:
            if not source.has(self.entry):
                reasons.append(f"{source.label}: does not have it")
                continue
            try:
                return source.files(self.entry)
            except (ConnectionError, ValueError) as error:
                self.unreachable[source.label] = str(error)
                reasons.append(f"{source.label}: {error}")
        raise self._failure(reasons)

    def _check_space(self, folder: Path) -> None:
        there = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        spare = max((package_index.temporary_space(file) for file in self.planned), default=0)
        need = max(0, self.total - there) + spare + MARGIN
        have = shutil.disk_usage(folder).free
        if need > have:
            raise OSError(
                f"not enough space for {self.entry.name}: it needs {human_size(need)} and {self.home} has {human_size(have)} free; "
                "free some, or set QWEN2_HOME to another disk"
            )

    def _file(self, folder: Path, file: File, before: int) -> StoredFile:
        """One file, from the first source that has it whole and right."""
        finished = folder / file.path
        if finished.exists() and file.sha256 is not None and finished.stat().st_size == file.size:
            digest = file_digest(finished).hexdigest()
            if digest == file.sha256:
                return StoredFile(file.path, file.size, digest, "an earlier pull")
        reasons = []
        for source in self.sources:
            lost = self.unreachable.get(source.label) if source.has(self.entry) else "does not have it"
            if lost is not None:
                reasons.append(f"{source.label}: {lost}")
                continue
            try:
                return StoredFile(file.path, file.size, self._fetch(source, folder, file, before), source.label)
            except (ConnectionError, ValueError) as error:
                if isinstance(error, ConnectionError):
                    self.unreachable[source.label] = str(error)
                reasons.append(f"{source.label}: {error}")
                self.watch(Progress(self.done, self.total, reasons[-1]))
        raise self._failure(reasons)

    def _fetch(self, source: FileSource, folder: Path, file: File, before: int) -> str:
        """The digest of the file, had from this source. Wrong behind what another had sent, it is fetched once more from its start."""
        with Partial(folder, file) as partial:
            resumed, start = partial.size > 0, before + partial.size

            def arrived(size: int) -> None:
                if self.giver != source.label:
                    self.giver = source.label
                    where = f", going on at {human_size(start)} of {human_size(self.total)}" if start else ""
                    self.watch(Progress(self.done, self.total, f"from {source.label}{where}"))
                self._advance(before + size)

            source.fetch(self.entry, file, partial, arrived)
            try:
                return partial.finish()
            except WrongFileError as error:
                if not resumed:
                    raise
                self.watch(Progress(self.done, self.total, f"{error}; from its start again, since the first bytes came from elsewhere"))
        return self._fetch(source, folder, file, before)  # the wrong bytes are gone, so that this one resumes nothing

    def _failure(self, reasons: Sequence[str]) -> OSError:
        """Every source with its reason, and what can be done where the network is the reason."""
        text = f"cannot pull {self.entry.name}: {'; '.join(reasons)}"
        if "no connection" not in text:
            return OSError(text)
        carried = [entry.name for entry in ENTRIES.values() if entry.known is not None and entry.known.parts]
        others = "" if self.entry.name in carried else f"; without the hubs there are {', '.join(carried)}"
        return OSError(f"{text}; check the network, or take a copy with --from PATH{others}")

    def _advance(self, done: int) -> None:
        if done > self.done:
            self.done = done
            self.watch(Progress(self.done, self.total))


def human_size(size: float) -> str:
    """A size in bytes as people write it: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.3g} TB"
