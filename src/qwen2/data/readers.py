"""Readers of all formats as one datatrove step: JSON lines and Parquet by datatrove's own, text, HTML and WARC here.

What cannot be read is counted and skipped, one document at a time where the format allows it: broken UTF-8, a line that is no
JSON, a page without text. A file that is cut short, altered or not what its ending says is read as far as it goes, and named in
the report. Files may be compressed, by gzip (.gz) or Zstandard (.zst). Every document gets its source, licence, role and language:
the declared one, or the likeliest of ours ("?" where that is another or there is none).

Left out: fetching pages (WARC files hold them), and PDF.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep

from qwen2.data.languages import choose, detect
from qwen2.data.recipe import DETECT, FORMATS, Source
from qwen2.data.steps import DETECTED, KEPT, UNKNOWN, Tally

READ, UNREAD = "read", "not readable"  # the step, and the outcome of what could not be read
PAGE_BYTES = 2**24  # of an HTML page; larger ones are no prose


@dataclass(frozen=True)
class Input:
    """One file of a source."""

    path: str
    format: str
    source: Source
    size: int


def format_of(path: Path, source: Source) -> str:
    """The format of a file: the source's, or what its ending says. ValueError where neither does."""
    endings = [ending for ending in path.suffixes if ending not in (".gz", ".zst")]
    found = source.format or FORMATS.get(endings[-1] if endings else "", "")
    if not found:
        raise ValueError(f"{path}: what format is this? Say it in the recipe: format is one of {', '.join(sorted(set(FORMATS.values())))}")
    return found


class ReadInputs(PipelineStep):
    """The documents of a task's files."""

    name = READ
    type = "READER"

    def __init__(self, plan: list[list[Input]], counts: str) -> None:
        super().__init__()
        self.plan, self.counts, self.tally = plan, get_datafolder(counts), Tally()

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Read each file of this task in turn."""
        for entry in self.plan[rank]:
            taken: Counter[str] = Counter()
            for number, (text, fields) in enumerate(read(Path(entry.path), entry.format)):
                document = self._document(entry, number, text, fields)
                reason = self._reason(document, text, entry.source, taken)
                self.tally.add(document, reason or KEPT, fields.get(WHY) if text is None else None)
                if text is None and BROKEN in fields:
                    self.tally.files[valid(entry.path)] = fields[WHY]
                if reason is None:
                    yield document
        self.tally.write(self.counts, self.name, rank)

    def _document(self, entry: Input, number: int, text: str | None, fields: dict[str, Any]) -> Document:
        source, declared = entry.source, fields.get("language")
        language = source.language or (valid(declared) if isinstance(declared, str) else "") or DETECT
        cleaned = "" if text is None else clean(text)
        metadata: dict[str, Any] = {"source": source.label, "role": source.role, "licence": source.licence, "language": language}
        if language == DETECT:
            found = detect(cleaned)
            code = choose(found, 0.0)
            metadata |= {"language": code or UNKNOWN, DETECTED: found[code] if code else 0.0}
        given = fields.get("id")
        label = valid(str(given) if isinstance(given, (str, int, float)) else f"{Path(entry.path).name}/{number}")
        if source.held_out and held(f"{source.label}:{label}", source.held_out):
            metadata["role"] = "held-out"
        return Document(text=cleaned, id=f"{source.label}:{label}", metadata=metadata)

    def _reason(self, document: Document, text: str | None, source: Source, taken: Counter[str]) -> str | None:
        if text is None:
            return UNREAD
        if not document.text:
            return "empty"
        if source.most_bytes:
            code = document.metadata["language"]
            if taken[code] >= source.most_bytes:
                return "over the source's share"
            taken[code] += len(document.text.encode("utf-8", "replace"))
        return None


def held(id: str, share: float) -> bool:
    """Whether a document is among those that are held out: by its id alone, so that it is so in every run."""
    return int.from_bytes(hashlib.blake2b(id.encode("utf-8", "replace"), digest_size=8).digest(), "little") < share * 2**64


def clean(text: str) -> str:
    """Lines without trailing space, at most one empty one between them, no control characters, no lone surrogates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _CONTROL.search(text):
        text = _CONTROL.sub("", text)
    text = valid(text)
    lines: list[str] = []
    for line in text.split("\n"):
        line = line.rstrip()
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip("\n")


_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
Read = Iterator[tuple[str | None, dict[str, Any]]]  # the text, or None where it could not be read; fields


WHY, BROKEN = "_why", "_broken"  # keys of the fields of what could not be read: why, and whether nothing follows in the file


def read(path: Path, format: str) -> Read:
    """The documents of a file. Where it does not go on, (None, {WHY: the reason, BROKEN: True}) is the last."""
    try:
        yield from READERS[format](path)
    except (OSError, EOFError, zlib.error, RecursionError) as error:
        yield None, {WHY: f"{valid(path.name)}: {type(error).__name__}: {valid(str(error)) or 'cut short'}", BROKEN: True}


def valid(text: str) -> str:
    """The text with a question mark for each lone surrogate, which UTF-8 cannot write."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _unread(why: str) -> tuple[None, dict[str, Any]]:
    return None, {WHY: why}


def _bytes(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def read_jsonl(path: Path) -> Read:
    """A line is an object with the key text."""
    with _bytes(path) as file:
        for line in file:
            if line.strip():
                yield _row(line)


def _row(line: bytes) -> tuple[str | None, dict[str, Any]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return _unread(f"{type(error).__name__}: {error}")
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return _unread("not an object with the key text")
    return row.pop("text"), row


def read_parquet(path: Path) -> Read:
    """The column text; others are fields."""
    import pyarrow
    from datatrove.pipeline.readers import ParquetReader

    def as_it_is(self: Any, row: dict[str, Any], place: str, number: int | str) -> dict[str, Any]:
        text = row.pop("text", None)
        return {"text": text if isinstance(text, str) and text else "\0", "id": str(number), "metadata": row}

    reader = ParquetReader(str(path.parent), adapter=as_it_is, batch_size=100)
    try:
        for document in reader.read_file(path.name):
            yield _unread("no text") if document.text == "\0" else (document.text, document.metadata)
    except (pyarrow.ArrowException, ValueError) as error:  # a ValueError: strings that are no UTF-8
        raise OSError(str(error)) from None


def read_text(path: Path) -> Read:
    """The whole file is one document; bytes that are no UTF-8 make it unreadable."""
    with _bytes(path) as file:
        data = file.read()
    try:
        yield data.decode("utf-8-sig"), {}
    except UnicodeDecodeError as error:
        yield _unread(f"not UTF-8: {error.reason} at byte {error.start}")


def read_html(path: Path) -> Read:
    """A page's main text, found by trafilatura."""
    with _bytes(path) as file:
        yield page_text(file.read(PAGE_BYTES + 1)), {}


def read_warc(path: Path) -> Read:
    """The HTML responses of a web archive; other records are passed over."""
    with _bytes(path) as file:
        for address, page in _responses(file):
            yield page_text(page), {"id": address}
        file.read(1)  # of a compressed file that is cut short this is an error, where warcio takes it for the end
        if path.suffix == ".warc":
            file.seek(-4, io.SEEK_END)
            if file.read() != b"\r\n\r\n":
                raise EOFError("ends within a record")


@dataclass(frozen=True)
class _Pieces:
    """A file read as far as it can be: an error behind good bytes comes when those have been taken."""

    file: Any

    def read(self, size: int) -> bytes:
        return self.file.read1(size)


def _responses(file: Any) -> Iterator[tuple[str | None, bytes]]:
    """Address and body of each HTML response; OSError where warcio cannot go on."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed
    from warcio.statusandheaders import StatusAndHeadersParserException

    try:
        for record in ArchiveIterator(_Pieces(file)):
            kind = record.http_headers.get_header("Content-Type", "") if record.http_headers else ""
            if record.rec_type == "response" and kind.partition(";")[0].strip() in ("text/html", "application/xhtml+xml"):
                yield record.rec_headers.get_header("WARC-Target-URI"), record.content_stream().read(PAGE_BYTES + 1)
            while record.raw_stream.read(2**16):
                pass
            if getattr(record.raw_stream, "limit", 0):
                raise EOFError("ends within a record")
    except (ArchiveLoadFailed, StatusAndHeadersParserException, AttributeError, ValueError) as error:  # the last two: altered headers
        raise OSError(str(error)) from None


def page_text(page: bytes) -> str | None:
    """The main text of an HTML page; "" where there is none, None where the page is too large to be one."""
    import trafilatura

    if len(page) > PAGE_BYTES:
        return None
    try:
        return trafilatura.extract(page, include_comments=False) or ""
    except RecursionError:  # elements within elements without end
        return None


READERS: dict[str, Callable[[Path], Read]] = {
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "text": read_text,
    "html": read_html,
    "warc": read_warc,
}
