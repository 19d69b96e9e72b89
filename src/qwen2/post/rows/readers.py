"""Files of post-training data, row by row: JSON, tables (tables.py), plain text; also compressed (.gz, .zst), also folders.

What a file is, its content says and not its name; what a row is, the row (formats.py), so that files of mixed formats are read as they
are. A row that cannot be used is `Skipped`, and the rows behind it are read; only behind a mistake in the syntax of a JSON array (up to
the next line that begins with one), or where a compressed file is cut short, nothing more can be found, which is one `Skipped` that
says so. A list of turns is one conversation, whether it is a line, the whole file, or an element of a list; every other array is rows.

Of a folder the texts count only where it has no files of rows, and never what describes a data set (README, LICENSE, dataset_info.json):
what is passed over is `Skipped` too. A file that is named itself is always read.

A file of plain text (.txt, .md) without empty lines has a document a line, as LLaMA-Factory and ms-swift take it; with empty lines, which
then divide paragraphs, it is one document. Such a name holds rows where it begins as JSON does, with the key of an object.

    for record in read(["alpaca.json", "folder/"]): ...
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen2.post.rows.formats import is_turn, record
from qwen2.post.rows.records import PlainText, Record, Skipped
from qwen2.post.rows.tables import CUT_SHORT, MAGICS, NOT_UTF8, STRAY, Rows, arrow, columns, separated

ENDINGS = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".md", ".gz", ".zst")
PROSE = (".txt", ".md")
ABOUT = ("readme", "license", "licence", "copying", "notice", "changelog", "citation", "contributing")  # texts whose names begin with it
DESCRIBES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
NOT_JSON = "not JSON"
BESIDE, BESIDE_ROWS = "a file beside the data", "a text beside files of rows; name it itself to learn from it"
MARK = b"\xef\xbb\xbf"  # of the byte order, which Windows' programs put before UTF-8
SPACE = re.compile(r"[\s,]*")
OBJECT = re.compile(rb'\s*(?:\[\s*)*\{\s*(?:\}|"[^"\n]*"\s*:)')  # how rows of JSON begin
NEXT_LINE, NEXT_ARRAY = re.compile(r"\n"), re.compile(r"\n(?=\[)")


def read(paths: str | Path | Iterable[str | Path], unused: Counter[str] | None = None) -> Iterator[Record]:
    """The records of files and folders, in order. `unused` counts columns that nothing was made of, by name.

    FileNotFoundError where a file is not there, ValueError for a folder without data and a file that is none of these kinds.
    """
    unused = Counter() if unused is None else unused
    for path in files([paths] if isinstance(paths, str | Path) else paths):
        if isinstance(path, Skipped):
            yield path
            continue
        for number, row in _rows(path):
            where = f"{path}:{number}"
            if isinstance(row, Skipped):
                yield Skipped(row.why, where, row.detail)
            elif isinstance(row, PlainText):
                yield PlainText(row.text, where)
            else:
                yield record(row, where, unused)


def files(paths: Iterable[str | Path]) -> Iterator[Path | Skipped]:
    """Files as they are named, those of a folder by their names; first what is passed over there."""
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if not path.is_dir():
            yield path
            continue
        every = sorted(one for one in path.rglob("*") if one.is_file() and not _hidden(one.relative_to(path)))
        found = [one for one in every if one.suffix in ENDINGS and not _describes(one)]
        rows = [one for one in found if not _is_prose(one)]
        taken = rows or found
        if not taken:
            raise ValueError(f"{path}: no data in this folder; its files would end in {', '.join(ENDINGS)}")
        yield from (Skipped(BESIDE_ROWS if one in found else BESIDE, str(one)) for one in every if one not in taken)
        yield from taken


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_prose(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(PROSE)


def _describes(path: Path) -> bool:
    """Whether it is about the data."""
    if path.name == "state.json" and next(path.parent.glob("*.arrow"), None):  # of a folder that `datasets` saved
        return True
    return path.name in DESCRIBES or (_is_prose(path) and re.split(r"[._ -]", path.name.lower())[0] in ABOUT)


def _rows(path: Path) -> Rows:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic in MAGICS:
        yield from columns(path)
        return
    data, problem = _bytes(path, magic)
    if data[:4] in MAGICS:
        yield from columns(data)
        return
    data = data.removeprefix(MARK)
    start = data.lstrip()[:1]
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    if _is_prose(path) and not OBJECT.match(data):
        yield from _prose(data)
    elif name.endswith((".csv", ".tsv")) and not OBJECT.match(data):
        yield from separated(data, "\t" if name.endswith(".tsv") else ",")
    elif start == b"[":
        yield from _arrays(data)
    elif start == b"{" or name.endswith((".json", ".jsonl", ".ndjson")):
        yield from _objects(data)
    elif start:
        raise ValueError(f"{path}: neither JSON, nor Parquet or Arrow; the name of a table ends in .csv or .tsv, a plain text's in .txt")
    if problem:
        yield 1 + data.count(b"\n"), Skipped(CUT_SHORT, "", problem)


def _bytes(path: Path, magic: bytes) -> tuple[bytes, str]:
    """What a file holds, as far as it can be read, and what ended it before its time."""
    if magic[:2] == b"\x1f\x8b":
        with gzip.GzipFile(path) as stream:
            return _read_on(stream.read1, 1 << 20)
    if magic != b"\x28\xb5\x2f\xfd":
        return path.read_bytes(), ""
    pyarrow = arrow()
    with pyarrow.input_stream(str(path), compression="zstd") as stream:
        data, problem = _read_on(stream.read, 1 << 20)
    if problem:  # with what the last read had before it failed, which single bytes give
        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            return stream.read(len(data)) + _read_on(stream.read, 1)[0], problem
    return data, ""


def _read_on(read: Callable[[int], bytes], size: int) -> tuple[bytes, str]:
    """What `read` gives, so many bytes at a time, until its end or an error, and that error."""
    pieces: list[bytes] = []
    try:
        while piece := read(size):
            pieces.append(piece)
    except (EOFError, OSError, zlib.error) as error:
        return b"".join(pieces), f"{type(error).__name__}: {error}"
    return b"".join(pieces), ""


def _objects(data: bytes) -> Rows:
    """A JSON object a line; or, where the first line alone is none, one object over several lines."""
    lines = data.split(b"\n")
    first = next((line for line in lines if line.strip()), b"")
    if isinstance(_parsed(first), Skipped) and not isinstance(whole := _parsed(data), Skipped):
        yield 1, whole
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Skipped(NOT_UTF8, "", f"byte {error.start + 1}: {error.reason}")
    except (ValueError, RecursionError) as error:
        return Skipped(NOT_JSON, "", str(error))


def _arrays(data: bytes) -> Rows:
    """What JSON arrays hold, an element at a time, and what stands behind them: more arrays, lists of turns, objects."""
    words = data.decode("utf-8", "surrogateescape")
    decoder, at, number, inside = json.JSONDecoder(), 0, 0, False
    while True:
        at = start = SPACE.match(words, at).end()  # type: ignore[union-attr]
        if inside and words[at : at + 1] == "]":
            at, inside = at + 1, False
        elif not inside and at == len(words):
            return
        elif not inside and words[at] == "[" and not _of_turns(words, at, decoder):
            at, inside = at + 1, True
        else:
            number += 1
            try:
                row, at = decoder.raw_decode(words, at)
            except (ValueError, RecursionError) as error:
                behind = (NEXT_ARRAY if inside or words.startswith("[\n", at) else NEXT_LINE).search(words, at)
                more = "" if behind else "; nothing behind it in this file can be read"
                yield number, Skipped(NOT_JSON, "", f"{error}{more}")
                at, inside = behind.end() if behind else len(words), False
                continue
            broken = STRAY.search(words, start, at)
            yield number, Skipped(NOT_UTF8, "", f"byte {ord(broken[0]) - 0xDC00:#x}") if broken else row


def _of_turns(words: str, at: int, decoder: json.JSONDecoder) -> bool:
    """Whether the first element of the array that begins there is a turn."""
    try:
        return is_turn(decoder.raw_decode(words, SPACE.match(words, at + 1).end())[0])  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return False


def _prose(data: bytes) -> Rows:
    lines = data.strip().split(b"\n")
    single = all(line.strip() for line in lines)
    for number, document in enumerate(lines if single else [b"\n".join(lines)], start=1):
        try:
            yield number, PlainText(document.decode("utf-8").strip("\r"), "")
        except UnicodeDecodeError as error:
            yield number, Skipped(NOT_UTF8, "", f"byte {error.start + 1}: {error.reason}")
