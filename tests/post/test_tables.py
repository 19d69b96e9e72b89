"""Rows of tables: nulls that a column of structs fills in, Arrow's two formats, CSV as spreadsheets and pandas write it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qwen2.post.rows.readers import BESIDE, read
from qwen2.post.rows.records import Example, PlainText, Preference, Record, Skipped
from qwen2.post.rows.tables import CUT_SHORT, NOT_TABLE, NOT_UTF8
from qwen2.post.rows.turns import NO_KNOWN_FORMAT

TURNS = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]


def stream(rows: list[dict[str, Any]], whole: bool = False) -> bytes:
    """An Arrow stream, or with its footer a file, a few rows a batch."""
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with (pyarrow.ipc.new_file if whole else pyarrow.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return sink.getvalue()


def whys(records: list[Record]) -> list[str]:
    return [record.why if isinstance(record, Skipped) else type(record).__name__ for record in records]


def calling(name: str, **arguments: str) -> dict[str, Any]:
    """A row with a call of one tool, which has the same parameters."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    properties = {key: {"type": "string", "enum": ["a", None]} for key in arguments}
    tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    return {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [tool]}


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_structs_have_the_fields_of_their_own_row_alone(tmp_path: Path, ending: str) -> None:
    rows = [calling("weather", city="Rome"), calling("time", zone="CET"), {"messages": TURNS, "tools": None}]
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.arrow").write_bytes(stream(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, expected = list(read(tmp_path / f"a.{ending}")), list(read(tmp_path / "a.jsonl"))
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Example)
        assert isinstance(other, Example)
        assert (one.messages, one.tools) == (other.messages, other.tools)


@pytest.mark.parametrize("whole", [False, True])
def test_arrow_is_told_by_its_content_and_read_as_far_as_it_goes(tmp_path: Path, whole: bool) -> None:
    data = stream([{"instruction": f"q{i}", "output": f"a{i}"} for i in range(1000)], whole)
    for name, content in (("a.arrow", data), ("b", data), ("c.arrow.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        assert whys(list(read(tmp_path / name))) == ["Example"] * 1000
    (tmp_path / "d.arrow").write_bytes(data[: len(data) // 2])
    cut = whys(list(read(tmp_path / "d.arrow")))
    assert cut == ["Example"] * (len(cut) - 1) + [CUT_SHORT]
    assert 300 <= len(cut) <= 600


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text('{"_split": "train"}')
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(stream([{"messages": TURNS}]))
    assert whys(list(read(tmp_path))) == [BESIDE, BESIDE, "Example"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.json").write_text(json.dumps({"text": "Ohio"}))
    assert whys(list(read(tmp_path / "other"))) == ["PlainText"], "beside no Arrow file it is a file like others"


def table(rows: list[list[str]], delimiter: str = ",", end: str = "\r\n") -> str:
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter, lineterminator=end).writerows(rows)
    return written.getvalue()


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", "\t")])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_csv_has_a_header_and_rows(tmp_path: Path, name: str, delimiter: str, end: str) -> None:
    long = "word, " * 50_000  # of more characters than Python's module takes unless it is told to
    rows = [["instruction", "input", "output", "score"], ["Add.\nNow", "1;\t1", '"2", so', "1"], ["q2", "", long, "2"]]
    (tmp_path / name).write_text("\ufeff" + table(rows, delimiter, end), encoding="utf-8", newline="")
    unused: Counter[str] = Counter()
    found = list(read(tmp_path / name, unused))
    assert [record.messages for record in found if isinstance(record, Example)] == [
        [{"role": "user", "content": "Add.\nNow\n1;\t1"}, {"role": "assistant", "content": '"2", so'}],
        [{"role": "user", "content": "q2"}, {"role": "assistant", "content": long}],
    ]
    assert [record.where for record in found] == [f"{tmp_path / name}:2", f"{tmp_path / name}:4"], "the lines that rows begin in"
    assert unused == {"score": 2}
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert whys(list(read(tmp_path))) == ["Example"] * 4


def test_csv_of_one_column_of_pairs_and_of_labels(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(table([["text"], ["One, two."], ["Three."]]))
    assert [record.text for record in read(tmp_path / "a.csv") if isinstance(record, PlainText)] == ["One, two.", "Three."]
    (tmp_path / "b.csv").write_text(table([["prompt", "chosen", "rejected"], ["q1", "good", "bad"]]))
    assert [type(record) for record in read(tmp_path / "b.csv")] == [Preference]
    (tmp_path / "c.csv").write_text(table([["prompt", "completion", "label"], ["q1", "a1", "False"], ["q2", "a2", "1"]]))
    assert [record.label for record in read(tmp_path / "c.csv") if isinstance(record, Example)] == [False, True]


def test_turns_in_a_cell_are_read_as_json_and_as_python_prints_them(tmp_path: Path) -> None:
    rows = [["messages"], [json.dumps(TURNS)], [repr(TURNS)], [repr(TURNS)[:-9]]]
    (tmp_path / "a.csv").write_text(table(rows))
    found = list(read(tmp_path / "a.csv"))
    assert whys(found) == ["Example", "Example", NOT_TABLE]
    assert all(record.messages == TURNS for record in found if isinstance(record, Example))
    (tmp_path / "b.csv").write_text(table([["prompt", "completion"], [repr(TURNS[:1]), "[1, 2]"]]))
    (made,) = read(tmp_path / "b.csv")
    assert isinstance(made, Example)
    assert [message["content"] for message in made.messages] == ["q1", "[1, 2]"]


def test_rows_of_a_csv_file_that_are_broken_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    rows = b'prompt,completion\nq1,a1\nq2\n\nq3,a3,more\n"q4"x,a4\nq5,\xff\nq6,a6\nq7,"a7\nq8,a8\n'
    (tmp_path / "a.csv").write_bytes(rows)
    found = list(read(tmp_path / "a.csv"))
    assert whys(found) == ["Example", NOT_TABLE, NOT_TABLE, NOT_TABLE, NOT_UTF8, "Example", NOT_TABLE]
    assert [record.where.rpartition(":")[2] for record in found] == ["2", "3", "5", "6", "7", "8", "9"]
    assert isinstance(found[-1], Skipped)
    assert "up to line 10" in found[-1].detail
    (tmp_path / "d.csv").write_bytes("prompt,completion\nq1,a1\n".encode("utf-16"))
    assert [(record.why, record.detail[:10]) for record in read(tmp_path / "d.csv") if isinstance(record, Skipped)] == [
        (NOT_UTF8, "the header")
    ]
    (tmp_path / "b.csv").write_text("name,place\nx,y\n")
    (tmp_path / "c.csv").write_text(json.dumps({"messages": TURNS}) + "\n")
    assert whys(list(read(tmp_path / "b.csv"))) == [NO_KNOWN_FORMAT]
    assert whys(list(read(tmp_path / "c.csv"))) == ["Example"], "content goes before the name"
