"""Readers of all formats as one datatrove step: JSON lines and Parquet by datatrove's own, text, HTML and WARC here.

What cannot be read is counted and skipped, one document at a time where the format allows it: broken UTF-8, a line that is no
JSON, a page without text, a file that is cut short. Every document gets its source, language (as far as it is declared), licence
and role.

Left out: fetching pages (WARC files hold them), and PDF.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep

from qwen2.data.recipe import DETECT, FORMATS, Source
from qwen2.data.steps import KEPT, Tally

STEP = "read"
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

    name = STEP
    type = "READER"

    def __init__(self, plan: list[list[Input]], counts: str) -> None:
        super().__init__()
        self.plan, self.counts, self.tally = plan, get_datafolder(counts), Tally()

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Read each file of this task in turn."""
        for entry in self.plan[rank]:
            taken: Counter[str] = Counter()
            for number, (text, fields) in enumerate(READERS[entry.format](Path(entry.path))):
                document = self._document(entry, number, text, fields)
                reason = self._reason(document, text, entry.source, taken)
                self.tally.add(document, reason or KEPT)
                if reason is None:
                    yield document
        self.tally.write(self.counts, self.name, rank)

    def _document(self, entry: Input, number: int, text: str | None, fields: dict[str, Any]) -> Document:
        source, declared = entry.source, fields.get("language")
        language = source.language or (declared if isinstance(declared, str) else "") or DETECT
        metadata = {"source": source.label, "role": source.role, "licence": source.licence, "language": language}
        label = str(fields.get("id") or f"{Path(entry.path).name}/{number}")
        cleaned = "" if text is None else clean(text)
        return Document(text=cleaned, id=f"{source.label}:{label}", metadata=metadata)

    def _reason(self, document: Document, text: str | None, source: Source, taken: Counter[str]) -> str | None:
        if text is None:
            return "not readable"
        if not document.text:
            return "empty"
        if source.most_bytes:
            code = document.metadata["language"]
            if taken[code] >= source.most_bytes:
                return "over the source's share"
            taken[code] += len(document.text.encode("utf-8", "replace"))
        return None


def clean(text: str) -> str:
    """Lines without trailing space, at most one empty one between them, no control characters, no lone surrogates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _CONTROL.search(text):
        text = _CONTROL.sub("", text)
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    lines: list[str] = []
    for line in text.split("\n"):
        line = line.rstrip()
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip("\n")


_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
Read = Iterator[tuple[str | None, dict[str, Any]]]  # the text, or None where it could not be read; fields


def _bytes(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def read_jsonl(path: Path) -> Read:
    """A line is an object with the key text."""
    with _bytes(path) as file:
        try:
            for line in file:
                if line.strip():
                    yield _row(line)
        except EOFError:  # a compressed file that was cut short
            yield None, {}


def _row(line: bytes) -> tuple[str | None, dict[str, Any]]:
    try:
        row = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return None, {}
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return None, {}
    return row.pop("text"), row


def read_parquet(path: Path) -> Read:
    """The column text; others are fields."""
    from datatrove.pipeline.readers import ParquetReader

    def as_it_is(self: Any, row: dict[str, Any], place: str, number: int | str) -> dict[str, Any]:
        text = row.pop("text", None)
        return {"text": text if isinstance(text, str) and text else "\0", "id": str(number), "metadata": row}

    reader = ParquetReader(str(path.parent), adapter=as_it_is, batch_size=100)
    import pyarrow

    try:
        for document in reader.read_file(path.name):
            yield (None if document.text == "\0" else document.text), document.metadata
    except (pyarrow.ArrowException, OSError):
        yield None, {}


def read_text(path: Path) -> Read:
    """The whole file is one document; bytes that are no UTF-8 make it unreadable."""
    with _bytes(path) as file:
        try:
            yield file.read().decode("utf-8-sig"), {}
        except (UnicodeDecodeError, EOFError):
            yield None, {}


def read_html(path: Path) -> Read:
    """A page's main text, found by trafilatura."""
    with _bytes(path) as file:
        try:
            yield page_text(file.read(PAGE_BYTES + 1)), {}
        except EOFError:
            yield None, {}


def read_warc(path: Path) -> Read:
    """The HTML responses of a web archive; other records are passed over."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    with open(path, "rb") as file:
        try:
            for record in ArchiveIterator(file):
                kind = record.http_headers.get_header("Content-Type", "") if record.http_headers else ""
                if record.rec_type == "response" and kind.partition(";")[0].strip() in ("text/html", "application/xhtml+xml"):
                    address = record.rec_headers.get_header("WARC-Target-URI")
                    yield page_text(record.content_stream().read(PAGE_BYTES + 1)), {"id": address}
        except (ArchiveLoadFailed, EOFError):
            yield None, {}


def page_text(page: bytes) -> str | None:
    """The main text of an HTML page; "" where there is none, None where the page is too large to be one."""
    import trafilatura

    if len(page) > PAGE_BYTES:
        return None
    return trafilatura.extract(page, include_comments=False) or ""


READERS: dict[str, Callable[[Path], Read]] = {
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "text": read_text,
    "html": read_html,
    "warc": read_warc,
}
