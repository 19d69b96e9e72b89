"""Token shards on disk: written once, read memory-mapped, each file with its hash.

A folder holds `manifest.json` and, per shard, `NAME.tokens` (ids end to end, little-endian uint16 where the vocabulary has at
most 65,536 ids, else uint32; every document ends with the tokenizer's end id) and `NAME.ends` (little-endian uint64: for each
document the offset in tokens behind its last one). One shard holds documents of one split, language and source; a large one is
cut into several. The manifest comes last, so a folder without it is not a set of shards.

Left out: compression (pages are mapped as they lie), and choosing documents (`mixture.py`).

    shards = Shards.open("corpus/shards")
    for ids in shards.documents(shards.shards[0]): ...
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1
MANIFEST = "manifest.json"
SEEN = ".verified.json"
SETTLED = 2_000_000_000  # nanoseconds: coarser than any file system's clock
SPLITS = ("train", "held-out")
SHORT_IDS = 2**16  # vocabularies up to here are stored in two bytes an id
NAME = 80  # characters of a language or source in a file's name
SHARD_TOKENS = 2**28  # of one file: at four bytes an id a gigabyte
BUFFER = 2**25  # bytes kept in memory before files are appended to; hundreds of open files would exceed a process's share

Ids = npt.NDArray[np.generic]


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer the ids belong to: the sha256 of its tokenizer.json, the size of its vocabulary, the id that ends a document."""

    sha256: str
    vocabulary: int
    end: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of an id on disk."""
        return np.dtype("<u2" if self.vocabulary <= SHORT_IDS else "<u4")


@dataclass(frozen=True)
class Shard:
    """One shard's entry in the manifest; `bytes` are those of the documents' text in UTF-8, for bits per byte."""

    name: str
    split: str
    language: str
    source: str
    documents: int
    tokens: int
    bytes: int
    sha256_tokens: str
    sha256_ends: str


class Documents(Sequence[Ids]):
    """The documents of one shard as arrays of ids, each with its end id; nothing is read before it is asked for."""

    def __init__(self, ids: Ids, ends: npt.NDArray[np.uint64]) -> None:
        self.ids, self.ends = ids, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        """The ids of one document, shape (tokens,); a slice gives a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.ids[self.start(place) : int(self.ends[place])]

    def start(self, index: int) -> int:
        """The offset of a document's first token."""
        return int(self.ends[index - 1]) if index else 0

    def length(self, index: int) -> int:
        """The tokens of one document, its end id among them."""
        return int(self.ends[index]) - self.start(index)


class Shards:
    """A folder of shards, opened. `shards` are its records, in the manifest's order."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], tokenizer: TokenizerInfo, shards: tuple[Shard, ...]) -> None:
        self.folder, self.manifest, self.tokenizer, self.shards = folder, manifest, tokenizer, shards
        self._open: dict[str, Documents] = {}

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True, remember: bool = False) -> Shards:
        """Read the manifest and look at every file: its size, and with `verify` its hash too.

        With `remember` a hash is read once: as long as a file has the size and time that it had then it is not read again.
        ValueError names a file that was cut short, altered, or has documents that do not fit; FileNotFoundError one that is gone.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no {MANIFEST} here; qwen2 data prepare writes a folder of shards")
        manifest = read_manifest(path)
        found = cls(folder, manifest, _fields(TokenizerInfo, manifest["tokenizer"], path), _records(manifest["shards"], path))
        seen = Seen(folder / SEEN) if remember else None
        for record in found.shards:
            found._check(record, verify, seen)
        if seen is not None:
            seen.write()
        return found

    def select(self, split: str | None = None, language: str | None = None, source: str | None = None) -> list[Shard]:
        """The records that match; None matches all."""
        wanted = {"split": split, "language": language, "source": source}
        return [r for r in self.shards if all(value is None or getattr(r, key) == value for key, value in wanted.items())]

    def documents(self, record: Shard) -> Documents:
        """The documents of a shard, memory-mapped."""
        if record.name not in self._open:
            tokens, ends = self.paths(record)
            self._open[record.name] = Documents(_mapped(tokens, self.tokenizer.dtype), _mapped(ends, np.dtype("<u8")))
        return self._open[record.name]

    def paths(self, record: Shard) -> tuple[Path, Path]:
        """The two files of a shard."""
        return self.folder / f"{record.name}.tokens", self.folder / f"{record.name}.ends"

    def _check(self, record: Shard, verify: bool, seen: Seen | None = None) -> None:
        tokens, ends = self.paths(record)
        sizes = {tokens: record.tokens * self.tokenizer.dtype.itemsize, ends: record.documents * 8}
        for path, size in sizes.items():
            if not path.is_file():
                raise FileNotFoundError(f"{path}: listed in {MANIFEST} but gone; make the shards again, or bring the file back")
            if path.stat().st_size != size:
                raise ValueError(f"{path}: has {path.stat().st_size:,} bytes, {MANIFEST} says {size:,}: it was cut short or altered")
        for path, digest in ((tokens, record.sha256_tokens), (ends, record.sha256_ends)) if verify else ():
            if (sha256_of(path) if seen is None else seen.sha256_of(path)) != digest:
                raise ValueError(f"{path}: its sha256 is not the one in {MANIFEST}: it was altered; make the shards again")
        places = self.documents(record).ends
        if len(places) and (int(places[-1]) != record.tokens or (verify and bool((np.diff(places.astype(np.int64)) <= 0).any()))):
            raise ValueError(f"{ends}: its offsets do not rise to the shard's {record.tokens:,} tokens")


class Seen:
    """Hashes of files that were read before, by name with size and time, in a file beside them.

    A file that was written so lately that another writing might have the same time is read again the next time.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.now = path, time.time_ns()
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            found = {}  # nothing is lost: all is read again
        self.known: dict[str, Any] = found if isinstance(found, dict) else {}
        self.found: dict[str, list[object]] = {}

    def sha256_of(self, path: Path) -> str:
        state = path.stat()
        entry = [state.st_size, state.st_mtime_ns, state.st_ino]
        known = self.known.get(path.name)
        digest = known[-1] if isinstance(known, list) and known[:-1] == entry else sha256_of(path)
        if state.st_mtime_ns < self.now - SETTLED:
            self.found[path.name] = [*entry, digest]
        return str(digest)

    def write(self) -> None:
        """Keep what is known. Where the folder cannot be written all is read again the next time."""
        if self.found == self.known:
            return
        draft = self.path.with_name(f"{self.path.name}-{uuid.uuid4().hex[:8]}")  # other machines may do the same
        try:
            draft.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
            os.replace(draft, self.path)
        except OSError:
            draft.unlink(missing_ok=True)


class ShardWriter:
    """Writes shards as a context manager: whole or not at all.

    Documents keep the order in which they are added. When the block ends without an error, files get their names and the
    manifest is written; after an error nothing is left. FileExistsError where the folder holds shards already.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: TokenizerInfo,
        dtype: npt.DTypeLike | None = None,
        *,
        recipe: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.folder, self.tokenizer = Path(folder), tokenizer
        if dtype is not None and np.dtype(dtype).newbyteorder("<") != tokenizer.dtype:
            raise ValueError(f"a vocabulary of {tokenizer.vocabulary:,} ids is stored as {tokenizer.dtype}, not {np.dtype(dtype)}")
        if not 0 <= tokenizer.end < tokenizer.vocabulary:
            raise ValueError(f"the end id {tokenizer.end} is no id of a vocabulary of {tokenizer.vocabulary:,}")
        self.recipe, self.extra, self.shard_tokens = dict(recipe or {}), dict(extra or {}), shard_tokens
        self._parts: dict[tuple[str, str, str], list[_Part]] = {}
        self._buffered = 0

    def __enter__(self) -> ShardWriter:
        if (self.folder / MANIFEST).exists():
            raise FileExistsError(f"{self.folder}: holds shards already; name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._work = self.folder / f".writing-{uuid.uuid4().hex[:8]}"
        self._work.mkdir()
        return self

    def add(self, split: str, language: str, source: str, ids: Sequence[int] | Ids, text_bytes: int) -> None:
        """One document: its ids (the end id is put behind them), and the bytes of its text in UTF-8.

        ValueError for an id that the vocabulary lacks and for an unknown split.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: there are {', '.join(SPLITS)}")
        given = np.asarray(ids, dtype=np.int64)
        if given.size and not 0 <= given.min() <= given.max() < self.tokenizer.vocabulary:
            raise ValueError(f"ids from {given.min()} to {given.max()}, the vocabulary has {self.tokenizer.vocabulary:,}")
        part = self._part((split, language, source), len(given) + 1)
        part.tokens += given.astype(self.tokenizer.dtype).tobytes() + self._end_bytes
        part.count += len(given) + 1
        part.bytes += text_bytes
        part.ends.append(part.count)
        self._buffered += (len(given) + 1) * self.tokenizer.dtype.itemsize
        if self._buffered > BUFFER:
            self._flush()

    def extend(self, record: Shard, documents: Documents) -> None:
        """All documents of another writer's shard, of the same tokenizer; they stay together."""
        part = self._part((record.split, record.language, record.source), record.tokens)
        part.tokens += documents.ids.tobytes()
        part.ends += (documents.ends.astype(np.int64) + part.count).tolist()
        part.count += record.tokens
        part.bytes += record.bytes
        self._flush()

    @property
    def _end_bytes(self) -> bytes:
        return np.array(self.tokenizer.end, self.tokenizer.dtype).tobytes()

    def _part(self, key: tuple[str, str, str], more: int) -> _Part:
        parts = self._parts.setdefault(key, [])
        if not parts or (parts[-1].count and parts[-1].count + more > self.shard_tokens):
            parts.append(_Part(self._work / f"{len(self._parts)}-{len(parts)}"))
        return parts[-1]

    def _flush(self) -> None:
        for parts in self._parts.values():
            parts[-1].flush()
            for part in parts[:-1]:
                part.flush()
        self._buffered = 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _finish(self) -> None:
        self._flush()
        records, names = [], set[str]()
        for split, language, source in sorted(self._parts):
            for number, part in enumerate(self._parts[split, language, source]):
                stem = f"{split}-{_in_a_name(language)}-{_in_a_name(source)}"
                while f"{stem}-{number:05}" in names:  # two languages or sources whose names differ in such characters only
                    stem += "_"
                name = f"{stem}-{number:05}"
                names.add(name)
                records.append(part.finish(self.folder / name, Shard(name, split, language, source, 0, 0, 0, "", "")))
        manifest = {"format": FORMAT, "recipe": self.recipe, "tokenizer": asdict(self.tokenizer), "shards": [asdict(r) for r in records]}
        write_json(self.folder / MANIFEST, {**manifest, **self.extra})


def _in_a_name(text: str) -> str:
    """What any file system takes: a document may call its language what it likes."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text)[:NAME]


class _Part:
    """A shard in the making: what is not yet in its files, and its counts."""

    def __init__(self, stem: Path) -> None:
        self.stem, self.tokens, self.ends = stem, bytearray(), list[int]()
        self.count = self.bytes = self.documents = 0

    def flush(self) -> None:
        if not self.ends:
            return
        with open(f"{self.stem}.tokens", "ab") as file:
            file.write(self.tokens)
        with open(f"{self.stem}.ends", "ab") as file:
            file.write(np.array(self.ends, "<u8").tobytes())
        self.documents += len(self.ends)
        self.tokens.clear()
        self.ends.clear()

    def finish(self, place: Path, record: Shard) -> Shard:
        digests = {}
        for ending in ("tokens", "ends"):
            digests[f"sha256_{ending}"] = sha256_of(Path(f"{self.stem}.{ending}"))
            os.replace(f"{self.stem}.{ending}", f"{place}.{ending}")
        counts = {"documents": self.documents, "tokens": self.count, "bytes": self.bytes}
        return Shard(**{**asdict(record), **counts, **digests})


def merge(parts: Iterable[str | Path], folder: str | Path, recipe: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> Shards:
    """Join folders of shards, in order, into one; they must be of one tokenizer. Parts made side by side give what one task gives."""
    opened = [Shards.open(part, verify=False) for part in parts]
    if not opened:
        raise ValueError("there are no shards to join")
    if len({part.tokenizer for part in opened}) > 1:
        raise ValueError(f"{folder}: the parts are of different tokenizers and cannot be joined")
    with ShardWriter(folder, opened[0].tokenizer, recipe=recipe, extra=extra) as writer:
        for part in opened:
            for record in part.shards:
                writer.extend(record, part.documents(record))
    return Shards.open(folder, verify=False)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest as it is written, checked for its form: ValueError naming the file."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a manifest: {error}") from None
    wanted: dict[str, type] = {"format": int, "recipe": dict, "tokenizer": dict, "shards": list}
    if not isinstance(manifest, dict) or any(not isinstance(manifest.get(key), kind) for key, kind in wanted.items()):
        raise ValueError(f"{path}: not a manifest of shards: it needs {', '.join(wanted)}")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: format {manifest['format']}, this version reads {FORMAT}; make the shards again")
    return manifest


def _records(entries: Sequence[Any], path: Path) -> tuple[Shard, ...]:
    return tuple(_fields(Shard, entry, path) for entry in entries)


def _fields(kind: type[Any], entry: Any, path: Path) -> Any:
    wanted = {field.name: {"str": str, "int": int}[str(field.type)] for field in fields(kind)}
    if not isinstance(entry, dict) or entry.keys() != wanted.keys():
        raise ValueError(f"{path}: {str(entry)[:80]}: an entry has {', '.join(wanted)}")
    for key, value in entry.items():
        if not isinstance(value, wanted[key]) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{path}: {key} is {value!r}")
    if kind is Shard and re.search(r"[/\\]|^\.", entry["name"]):
        raise ValueError(f"{path}: {entry['name']!r} is no name of a shard")
    return kind(**entry)


def _mapped(path: Path, dtype: np.dtype[Any]) -> Any:
    """A file as a plain array over its pages: a slice of numpy's own memmap takes several times as long."""
    return np.memmap(path, dtype, "r").view(np.ndarray) if path.stat().st_size else np.empty(0, dtype)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON under a temporary name, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
