"""Files of post-training data: kinds told by content, rows one by one, damage counted and never silent."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2.post.rows.readers import BESIDE, BESIDE_ROWS, CUT_SHORT, NOT_JSON, NOT_UTF8, files, read
from qwen2.post.rows.records import Example, PlainText, Preference, Record, Skipped
from qwen2.post.rows.turns import NO_KNOWN_FORMAT

ROWS: list[dict[str, Any]] = [
    {"instruction": "q1", "output": "a1"},
    {"conversations": [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}]},
    {"messages": [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]},
    {"prompt": "q1", "chosen": "a1", "rejected": "a2"},
    {"text": "A document."},
]
KINDS = [Example, Example, Example, Preference, PlainText]


def test_files_that_need_a_package_say_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(64))
    (tmp_path / "b.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(64))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "b.jsonl.zst"):
        with pytest.raises(ValueError, match=r"pyarrow, which is not installed: pip install 'qwen2\[train\]'"):
            list(read([tmp_path / name]))


def kinds(records: list[Record]) -> list[type]:
    return [type(record) for record in records]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data"])
def test_a_file_of_mixed_formats_is_read_row_by_row(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(lines(ROWS))
    found = list(read(tmp_path / name))
    assert kinds(found) == KINDS
    assert [record.where for record in found] == [f"{tmp_path / name}:{number}" for number in range(1, 6)]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "data.jsonl").write_text("\ufeff " + json.dumps(ROWS, indent=indent), encoding="utf-8")
    assert kinds(list(read(tmp_path / "data.jsonl"))) == KINDS


def test_one_object_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(ROWS[0], indent=2))
    assert kinds(list(read(tmp_path / "data.json"))) == [Example]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    talk = [{"role": "user", "content": "q1", "tool_calls": None}, {"role": "assistant", "content": "a1", "tool_calls": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk}, {"messages": talk[:1]}]), tmp_path / "data.bin")
    found = list(read(tmp_path / "data.bin"))
    assert kinds(found) == [Example, Skipped]
    assert found[1].where.endswith("data.bin:2")
    whole = (tmp_path / "data.bin").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (cut,) = read(tmp_path / "cut.parquet")
    assert isinstance(cut, Skipped)
    assert cut.why == CUT_SHORT


def test_compressed_files(tmp_path: Path) -> None:
    import pyarrow

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    with pyarrow.output_stream(str(tmp_path / "b.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines(ROWS))
    assert kinds(list(read(tmp_path))) == KINDS * 2


def zstd(data: bytes) -> bytes:
    import pyarrow

    whole: bytes = pyarrow.compress(data, codec="zstd", asbytes=True)
    return whole


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("zst", zstd)])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_compressed_file_that_is_cut_short_gives_what_it_has_and_says_so(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes], share: float
) -> None:
    """Also where whole parts come before the one that is cut."""
    many = lines([{"instruction": f"q{number}", "output": str(hash(number**7))} for number in range(20_000)])
    path, whole = tmp_path / f"a.jsonl.{ending}", compress(many)
    for before in (b"", compress(lines(ROWS)) * 2):
        path.write_bytes(before + whole[: int(share * len(whole))])
        found = list(read(path))
        assert kinds(found[: 10 if before else 0]) == KINDS * 2 * bool(before)
        assert sum(isinstance(record, Example) for record in found) > 20_000 * (share - 0.2)
        assert isinstance(found[-1], Skipped)
        assert found[-1].why == CUT_SHORT
        assert not any(isinstance(record, Skipped) and record.why != NOT_JSON for record in found[:-1])


def test_plain_text_has_a_document_a_line_or_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\nTwo.\r\nThree.\n", newline="")
    (tmp_path / "b.txt").write_text("A chapter.\n\nIts second paragraph.\n")
    assert [record.text for record in read(tmp_path / "a.txt") if isinstance(record, PlainText)] == ["One.", "Two.", "Three."]
    assert [record.text for record in read(tmp_path / "b.txt") if isinstance(record, PlainText)] == ["A chapter.\n\nIts second paragraph."]


def test_lines_that_are_broken_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    good = lines(ROWS[:1])
    (tmp_path / "a.jsonl").write_bytes(good + b"{not json\n" + b'{"instruction": "\xff\xfe", "output": "x"}\n' + b"\n" + b"7\n" + good)
    found = list(read(tmp_path / "a.jsonl"))
    assert [record.why if isinstance(record, Skipped) else record.where.rpartition(":")[2] for record in found] == [
        "1",
        NOT_JSON,
        NOT_UTF8,
        "no known format",
        "6",
    ]


def test_a_file_whose_first_line_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{not json\n" + lines(ROWS))
    assert kinds(list(read(tmp_path / "a.jsonl"))) == [Skipped, *KINDS]


def test_an_array_with_a_broken_row_and_one_with_broken_syntax(tmp_path: Path) -> None:
    rows = [json.dumps(row).encode() for row in ROWS]
    (tmp_path / "a.json").write_bytes(b"[" + b",".join([rows[0], b'{"text": "\xff"}', rows[4]]) + b"]")
    found = list(read(tmp_path / "a.json"))
    assert kinds(found) == [Example, Skipped, PlainText]
    assert isinstance(found[1], Skipped)
    assert found[1].why == NOT_UTF8
    (tmp_path / "b.json").write_bytes(b"[" + rows[0] + b"," + rows[1][:-5])
    found = list(read(tmp_path / "b.json"))
    assert kinds(found) == [Example, Skipped]
    assert isinstance(found[1], Skipped)
    assert found[1].why == NOT_JSON
    assert "nothing behind it" in found[1].detail


def test_what_deep_nesting_does(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ' + b"[" * 200_000 + b"\n" + lines(ROWS[:1]))
    assert kinds(list(read(tmp_path / "a.jsonl"))) == [Skipped, Example]


def test_folders_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list(read([tmp_path / "missing.jsonl"]))
    with pytest.raises(ValueError, match="no data in this folder"):
        list(read(tmp_path))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="neither JSON, nor Parquet or Arrow"):
        list(read(tmp_path / "picture.png"))
    for name in ("b.jsonl", "a.jsonl", "dataset_info.json"):
        (tmp_path / name).write_bytes(lines(ROWS[:1]))
    assert [path.name for path in files([tmp_path]) if isinstance(path, Path)] == ["a.jsonl", "b.jsonl"]


def test_what_describes_a_folder_of_data_is_not_learned_and_is_said(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "description.md").write_text("x")
    beside = ("LICENSE", "LICENSE.txt", "README.md", "README_zh.md", "dataset_info.json", "part/CHANGELOG.md", "picture.png")
    for name in (*beside, "notes.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "part" / "train.jsonl").write_bytes(lines(ROWS[:1]))
    found = list(read(tmp_path))
    assert [(record.why, record.where) for record in found if isinstance(record, Skipped)] == [
        *[(BESIDE, str(tmp_path / name)) for name in beside[:5]],
        (BESIDE_ROWS, str(tmp_path / "notes.txt")),
        *[(BESIDE, str(tmp_path / name)) for name in beside[5:]],
    ]
    assert kinds(found)[len(beside) + 1 :] == [Example]
    assert kinds(list(read(tmp_path / "README.md"))) == [Skipped], "a file that is named is read, and this one is no row"


def test_a_folder_of_texts_alone_is_read_without_what_describes_it(tmp_path: Path) -> None:
    for name in ("chapter.txt", "README.md", "more.md"):
        (tmp_path / name).write_text(name)
    assert [record.text for record in read(tmp_path) if isinstance(record, PlainText)] == ["chapter.txt", "more.md"]
    (tmp_path / "chapter.txt").unlink()
    (tmp_path / "more.md").unlink()
    with pytest.raises(ValueError, match="no data in this folder"):
        list(read(tmp_path))
    (tmp_path / "readme_questions.jsonl").write_bytes(lines(ROWS[:1]))
    assert kinds(list(read(tmp_path))) == [Skipped, Example]


def test_unused_columns_of_all_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "x", "source": 1}, {"text": "y", "source": 2, "url": 3}]))
    unused: Counter[str] = Counter()
    assert len(list(read(tmp_path / "a.jsonl", unused))) == 2
    assert unused == {"source": 2, "url": 1}


@pytest.mark.parametrize("between", ["", "\n", "\n\n", ",\n"])
@pytest.mark.parametrize("indent", [None, 2])
def test_what_stands_behind_an_array_is_read_too(tmp_path: Path, between: str, indent: int | None) -> None:
    """As `cat a.json b.json` makes it, also with objects behind the last bracket."""
    array, last = json.dumps(ROWS, indent=indent), json.dumps(ROWS[0], indent=indent)
    (tmp_path / "a.json").write_text(between.join([array, array, last, "[]", array]) + "\n")
    found = list(read(tmp_path / "a.json"))
    assert kinds(found) == [*KINDS, *KINDS, Example, *KINDS]
    assert [record.where.rpartition(":")[2] for record in found] == [str(number) for number in range(1, 17)]


def test_rubbish_behind_an_array_is_counted_and_what_follows_is_read(tmp_path: Path) -> None:
    array = json.dumps(ROWS)
    (tmp_path / "a.json").write_text(f"{array}]\n{array} and so on\n{json.dumps(ROWS[0])}\n[{{broken}}, 1]\n{array}")
    found = list(read(tmp_path / "a.json"))
    assert kinds(found) == [*KINDS, Skipped, *KINDS, Skipped, Example, Skipped, *KINDS]
    assert [record.why for record in found if isinstance(record, Skipped)] == [NOT_JSON] * 3


TURNS = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]
SHARED = [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}]


@pytest.mark.parametrize("turns", [TURNS, SHARED])
def test_a_list_of_turns_is_a_conversation_wherever_it_stands(tmp_path: Path, turns: list[dict[str, str]]) -> None:
    line = json.dumps(turns)
    (tmp_path / "lines.jsonl").write_text(f"{line}\n{line}\n{line[:-9]}\n\n{line}\n")
    (tmp_path / "mixed.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{line}\n")
    (tmp_path / "lists.json").write_text(json.dumps([turns, turns], indent=2))
    (tmp_path / "one.json").write_text(json.dumps(turns, indent=2))
    for name, expected in (
        ("lines.jsonl", [Example, Example, Skipped, Example]),
        ("mixed.jsonl", [Example] * 2),
        ("lists.json", [Example] * 2),
        ("one.json", [Example]),
    ):
        found = list(read(tmp_path / name))
        assert kinds(found) == expected, name
        assert all(record.messages == TURNS for record in found if isinstance(record, Example))


def test_a_turn_alone_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]))
    found = list(read(tmp_path / "a.jsonl"))
    assert [record.why for record in found if isinstance(record, Skipped)] == [NO_KNOWN_FORMAT] * 2
    assert isinstance(found[0], Skipped)
    assert "a turn alone" in found[0].detail


@pytest.mark.parametrize("words", ["[1] Introduction", "[Verse 1]", "[[1]] and [2]", "{curly}", "[", '[{"so"} he said'])
def test_prose_may_begin_with_a_bracket(tmp_path: Path, words: str) -> None:
    (tmp_path / "paper.txt").write_text(f"{words}\nText of a paper.\n")
    assert [record.text for record in read(tmp_path / "paper.txt") if isinstance(record, PlainText)] == [words, "Text of a paper."]
    for number, rows in enumerate((json.dumps(ROWS), json.dumps(ROWS, indent=1), lines(ROWS).decode())):
        (tmp_path / f"{number}.txt").write_text(rows)
        assert kinds(list(read(tmp_path / f"{number}.txt"))) == KINDS
