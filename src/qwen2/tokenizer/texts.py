"""Texts to learn a vocabulary from, or to measure one on: files in, (language, text) out, without ever holding a corpus.

Files of JSON lines (`.jsonl`, also `.gz`) are documents with a `text` and, under `language` or `metadata.language`, a language; any
other file is plain UTF-8 text, handed out in pieces that end where a line does. `de=FILE` names the language of a file; else it is
"und", undetermined. A folder stands for all files in it that end in .jsonl or .txt. Documents that are marked with a split (`split`,
or `metadata.role` as `qwen2 data` writes it) can be chosen by it; those without a mark belong to every split.

What is left out: HTML, parquet and whatever else `data/` reads.

    for language, text in read_texts(["de=grimm.txt", "documents/"]): ...
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

Text = tuple[str, str]  # language, text
UNDETERMINED = "und"
OF_FOLDERS = (".jsonl", ".txt")  # the files that a folder stands for; what else lies there is no text to learn from
PIECE = 2**16  # bytes of a plain file that are handed out together, and the rest of their line
LANGUAGE = re.compile(r"([a-z]{2,3}(?:[-_][A-Za-z]{2,8})?)=(.+)", re.DOTALL)


def read_texts(sources: Iterable[str | Path], split: str | None = None) -> Iterator[Text]:
    """The texts of files and folders, in order; of documents that are marked with a split those of `split`, where it is given.

    Raises FileNotFoundError for what is not there, ValueError naming file and line for broken UTF-8 and for a line that is no document.
    """
    for source in sources:
        language, place = _named(source)
        for path in _files(place):
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                yield from _documents(path, language, split)
            else:
                yield from ((language or UNDETERMINED, text) for text in _pieces(path))


def _named(source: str | Path) -> tuple[str | None, Path]:
    """`de=FILE` taken apart; a file that has such a name itself is that file."""
    if isinstance(source, Path) or Path(source).exists():
        return None, Path(source)
    match = LANGUAGE.fullmatch(source)
    return (match[1], Path(match[2])) if match else (None, Path(source))


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        found = sorted(path for path in place.rglob("*") if path.is_file() and path.name.removesuffix(".gz").endswith(OF_FOLDERS))
        if not found:
            raise ValueError(f"{place}: the folder has no files that end in {', '.join(OF_FOLDERS)}, or in these and .gz")
        return found
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such file or folder")
    return [place]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _open(path) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                yield number, _decoded(line, path, number)
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from None


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: line {number} is not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}; convert the file, or leave it out"
        ) from None


def _documents(path: Path, language: str | None, split: str | None) -> Iterator[Text]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
        text = document.get("text") if isinstance(document, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{path}: line {number} has no text: a document is {{"text": "...", "language": "de"}}')
        metadata = document.get("metadata")
        fields = {**metadata, **document} if isinstance(metadata, dict) else document
        if split is None or fields.get("split", fields.get("role", split)) == split:
            yield language or _language(fields, path, number), text


def _language(fields: Mapping[str, object], path: Path, number: int) -> str:
    found = fields.get("language")
    if found is None:
        return UNDETERMINED
    if not isinstance(found, str) or not found:
        raise ValueError(f"{path}: line {number}: language is {found!r}, not a code such as de")
    return found


def _pieces(path: Path) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for _, line in _lines(path):
        held.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)
