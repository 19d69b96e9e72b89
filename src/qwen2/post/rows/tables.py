"""Rows of tables: Parquet and Arrow (a stream, or a file with its footer) by their columns, CSV and TSV by their header.

Columns of structs are the union of all rows: where one call has a city and another a zone, each has both, one of them null. Such nulls
inside a row's values are dropped, since the file cannot say which of them somebody wrote; JSON text in a cell stays as it is.

Of a CSV file the separator is the one that its header has most of: comma, tab or semicolon. A cell that is a list of turns, as JSON or as
Python prints it (pandas and `datasets` write such), is read as one; every other cell is text. What is left out: files without a header.

    for number, row in columns("data.parquet"): ...
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen2.post.rows.records import Skipped

NOT_UTF8, CUT_SHORT, NOT_TABLE = "not UTF-8", "a file that does not go on", "not a row of the table"
STRAY = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, as "surrogateescape" reads it
MAGICS = (b"PAR1", b"ARRO", b"\xff\xff\xff\xff")  # of Parquet, of an Arrow file, of an Arrow stream
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
SEPARATORS = (",", "\t", ";")
TURNS = re.compile(r"""\s*\[\s*\{\s*(?:"(?:role|from|content|value)"|'(?:role|from|content|value)')\s*:""")
AT_ONCE = 256  # rows that are made into Python's objects together
Rows = Iterator[tuple[int, Any]]  # number, and the row, a PlainText or a Skipped


def columns(source: str | Path | bytes) -> Rows:
    """The rows of a Parquet or Arrow file, or of what such a file holds, counted from 1. A last one is Skipped where it is cut short."""
    pyarrow, number = arrow(), 0
    try:
        with pyarrow.BufferReader(source) if isinstance(source, bytes) else pyarrow.memory_map(str(source)) as opened:
            for batch in _batches(opened):
                for start in range(0, batch.num_rows, AT_ONCE):
                    for row in batch.slice(start, AT_ONCE).to_pylist():
                        number += 1
                        yield number, _said(row)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        yield number + 1, Skipped(CUT_SHORT, "", str(error))


def arrow() -> Any:
    """pyarrow. ValueError where it is not installed."""
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise ValueError("Parquet, Arrow and .zst files are read by pyarrow, which is not installed: pip install 'qwen2[train]'") from None
    return pyarrow


def _batches(source: Any) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    magic = source.read(4)
    source.seek(0)
    if magic == MAGICS[0]:
        yield from pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=AT_ONCE)
    elif magic == MAGICS[1]:
        try:
            file = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:  # the footer is gone: what stands before it is a stream
            source.seek(8)
            yield from pyarrow.ipc.open_stream(source)
            raise
        yield from map(file.get_batch, range(file.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(source)
        source.seek(max(source.tell() - len(END), 0))
        if source.read() != END:  # cut between two batches, where pyarrow takes it for the end
            raise pyarrow.ArrowInvalid("the stream has no mark of its end")


def _said(value: Any) -> Any:
    """The value without the nulls of its structs."""
    if isinstance(value, dict):
        return {key: _said(one) for key, one in value.items() if one is not None}
    return [_said(one) for one in value] if isinstance(value, list) else value


def separated(data: bytes, separator: str) -> Rows:
    """The rows of a CSV file by the lines that they begin in; `separator` where the header has none of those known."""
    words = data.decode("utf-8", "surrogateescape")
    csv.field_size_limit(max(csv.field_size_limit(), len(words) + 1))
    first = words.lstrip().partition("\n")[0]
    found = max(SEPARATORS, key=first.count)
    reader = csv.reader(io.StringIO(words, newline=""), delimiter=found if found in first else separator, strict=True)
    names: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
            if not cells:
                continue
            if not names and STRAY.search("".join(cells)):
                yield number, Skipped(NOT_UTF8, "", "the header; without it nothing of the table can be read")
                return
            if not names:
                names = [name.strip() or f"column {i}" for i, name in enumerate(cells, start=1)]
                continue
            yield number, _row(names, cells)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, Skipped(NOT_TABLE, "", f"up to line {reader.line_num:,}: {error}")


def _row(names: list[str], cells: list[str]) -> Any:
    """A row's cells by their columns' names."""
    if len(cells) != len(names):
        return Skipped(NOT_TABLE, "", f"{len(cells):,} cells, the header names {len(names):,}")
    if broken := next(filter(None, map(STRAY.search, cells)), None):
        return Skipped(NOT_UTF8, "", f"byte {ord(broken[0]) - 0xDC00:#x}")
    row: dict[str, Any] = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            row[name] = _turns(cell) if TURNS.match(cell) else cell
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return Skipped(NOT_TABLE, "", f"{name} begins as a list of turns, and is one neither in JSON nor in Python")
    return row


def _turns(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return ast.literal_eval(cell.strip())
