"""Readers: every format, and what cannot be read is counted by kind, never silent and never the end of the run."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
from datatrove.data import Document

from qwen2.data.readers import ReadInputs, clean
from qwen2.data.recipe import Recipe, Source
from qwen2.data.sources import inputs_of

PAGE = "<html><head><title>T</title></head><body><nav>Home | About</nav><article><p>{}</p></article></body></html>"
PROSE = "This is the first paragraph of the page, and it is long enough to be taken for its text by whoever reads it. " * 3


def read(path: Path, counts: Path, **source: object) -> tuple[list[Document], dict[str, int]]:
    recipe = Recipe("test", (Source(path=path.name, name="src", **source),), tasks=1)  # type: ignore[arg-type]
    documents = list(ReadInputs(inputs_of(recipe, path.parent, None)[0], str(counts)).run())
    rows = json.loads((counts / "read" / "00000.json").read_text())["rows"]
    outcomes: Counter[str] = Counter()
    for _, _, outcome, number, _ in rows:
        outcomes[outcome] += number
    return documents, dict(outcomes)


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "One\\r\\ntwo\\u0000 \\ud800", "id": "x", "language": "en"}\n\n{"text": ""}\n{"body": 1}\n[1]\nnot json\n{"text": "\xff"}\n{"text": 5}\n'
    )
    documents, outcomes = read(path, tmp_path)
    assert [(d.text, d.id, d.metadata["language"]) for d in documents] == [("One\ntwo ?", "src:x", "en")]
    assert documents[0].metadata == {"source": "src", "role": "train", "licence": "unknown", "language": "en"}
    assert outcomes == {"kept": 1, "empty": 1, "not readable": 5}


def test_a_compressed_file_that_is_cut_short(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"line {n} " + str(hash((n, "x")))}) + "\n" for n in range(2000)).encode()
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines))
    assert read(path, tmp_path)[1] == {"kept": 2000}
    path.write_bytes(gzip.compress(lines)[:-3000])
    documents, outcomes = read(path, tmp_path)
    assert 0 < len(documents) < 2000
    assert outcomes["not readable"] == 1
    assert broken(tmp_path) == {str(path): "a.jsonl.gz: EOFError: Compressed file ended before the end-of-stream marker was reached"}


LINES = "".join(json.dumps({"text": f"line {n} " + str(hash((n, "x")))}) + "\n" for n in range(2000)).encode()


def flipped(data: bytes) -> bytes:
    """One byte in the middle altered."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]


def warc() -> bytes:
    head = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.example/\r\nContent-Type: application/http; msgtype=response\r\n"
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + PAGE.format(PROSE).encode()
    return head + f"Content-Length: {len(page)}\r\n\r\n".encode() + page + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", flipped(gzip.compress(LINES))),
        ("a.txt.gz", flipped(gzip.compress(LINES))),
        ("a.html.gz", flipped(gzip.compress(LINES))),
        ("a.warc.gz", flipped(gzip.compress(warc() * 200))),
        ("a.jsonl.gz", LINES),  # not compressed at all
        ("a.warc.gz", warc()),
        ("a.jsonl.zst", LINES),
        ("a.warc", warc() + warc()[:-30]),
        ("a.parquet", b"PAR1" + zlib.compress(LINES)[:200] + b"PAR1"),
        ("a.parquet", b""),
    ],
    ids=str.split("jsonl text html warc plain-jsonl plain-warc plain-zst cut-warc parquet empty-parquet"),  # the same in every process
)
def test_an_altered_file_is_named_and_the_next_one_is_read(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "whole"}\n')
    (tmp_path / name).write_bytes(data)
    recipe = Recipe("test", (Source(path=name, name="one"), Source(path="b.jsonl", name="two")), tasks=1)
    documents = list(ReadInputs(inputs_of(recipe, tmp_path, None)[0], str(tmp_path)).run())
    assert "two:b.jsonl/0" in [document.id for document in documents]
    assert list(broken(tmp_path)) == [str(tmp_path / name)]
    assert broken(tmp_path)[str(tmp_path / name)].startswith(name)


def broken(counts: Path) -> dict[str, str]:
    return json.loads((counts / "read" / "00000.json").read_text())["files"]


def test_zstandard(tmp_path: Path) -> None:
    import pyarrow

    packed = pyarrow.compress(LINES, codec="zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(packed + packed)  # two frames
    assert read(tmp_path / "a.jsonl.zst", tmp_path)[1] == {"kept": 4000}
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-300])
    documents, outcomes = read(tmp_path / "a.jsonl.zst", tmp_path)
    assert [document.text for document in documents] == [json.loads(line)["text"] for line in LINES.splitlines()[: len(documents)]]
    assert outcomes["not readable"] == len(broken(tmp_path)) == 1
    (tmp_path / "a.txt.zst").write_bytes(pyarrow.compress(b"One.", codec="zstd", asbytes=True))
    assert [document.text for document in read(tmp_path / "a.txt.zst", tmp_path)[0]] == ["One."]
    (tmp_path / "a.warc.zst").write_bytes(pyarrow.compress(warc() * 2, codec="zstd", asbytes=True))
    assert len(read(tmp_path / "a.warc.zst", tmp_path)[0]) == 2


def test_what_no_parser_and_no_writer_takes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    odd = [{"text": "a", "id": "\ud800"}, {"text": "b", "language": "\udfff"}, {"text": "c", "id": [["x"]]}]
    path.write_text("[" * 200_000 + "\n" + "".join(json.dumps(row) + "\n" for row in odd))
    documents, outcomes = read(path, tmp_path)
    assert [d.id for d in documents] == ["src:?", "src:a.jsonl/2", "src:a.jsonl/3"]
    assert documents[1].metadata["language"] == "?"
    assert outcomes == {"kept": 3, "not readable": 1}
    samples = json.loads((tmp_path / "read" / "00000.json").read_text())["samples"]
    assert samples["not readable"][0][2].startswith("RecursionError")


def test_text_and_broken_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffH\u00e9llo\n\n\n\nthere  \n", encoding="utf-8")
    documents, _ = read(tmp_path / "a.txt", tmp_path, language="fr", licence="MIT")
    assert [(d.text, d.id, d.metadata["language"], d.metadata["licence"]) for d in documents] == [
        ("H\u00e9llo\n\nthere", "src:a.txt/0", "fr", "MIT")
    ]
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    assert read(tmp_path / "b.txt", tmp_path)[1] == {"not readable": 1}
    (tmp_path / "c.txt").write_bytes(b"")
    assert read(tmp_path / "c.txt", tmp_path)[1] == {"empty": 1}


def test_html(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(PAGE.format(PROSE))
    (document,), _ = read(tmp_path / "a.html", tmp_path)
    assert document.text.startswith("This is the first paragraph")
    assert "About" not in document.text
    (tmp_path / "b.html").write_text("<html></html>")
    assert read(tmp_path / "b.html", tmp_path)[1] == {"empty": 1}


def test_warc(tmp_path: Path) -> None:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    path = tmp_path / "a.warc.gz"
    with open(path, "wb") as file:
        writer = WARCWriter(file, gzip=True)
        for n, kind in enumerate(("text/html; charset=utf-8", "image/png", "text/html")):
            headers = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.1")
            body = BytesIO(PAGE.format(PROSE).encode())
            writer.write_record(writer.create_warc_record(f"http://a.example/{n}", "response", payload=body, http_headers=headers))
    documents, outcomes = read(path, tmp_path)
    assert [d.id for d in documents] == ["src:http://a.example/0", "src:http://a.example/2"]
    assert outcomes == {"kept": 2}
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 5 // 6])
    assert len(read(path, tmp_path)[0]) == 1
    assert len(broken(tmp_path)) == 1
    for cut in range(1, len(warc()) - 1, 97):  # in the header, in the page, behind it
        (tmp_path / "b.warc").write_bytes(warc() + warc()[:cut])
        assert read(tmp_path / "b.warc", tmp_path)[1]["not readable"] == len(broken(tmp_path)) == 1
    path.write_bytes(b"no archive at all, only text that goes on\n" * 9)
    assert read(path, tmp_path)[1] == {"not readable": 1}


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": ["One.", None, "Three."], "language": ["en", "en", "de"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    documents, outcomes = read(tmp_path / "a.parquet", tmp_path)
    assert [(d.text, d.metadata["language"]) for d in documents] == [("One.", "en"), ("Three.", "de")]
    assert outcomes == {"kept": 2, "not readable": 1}
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    assert read(tmp_path / "b.parquet", tmp_path)[1] == {"not readable": 1}


def test_a_source_s_share(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 10, "language": code}) + "\n" for code in ["en"] * 5 + ["de"]))
    documents, outcomes = read(path, tmp_path, most_bytes=25)
    assert [d.metadata["language"] for d in documents] == ["en"] * 3 + ["de"]
    assert outcomes == {"kept": 4, "over the source's share": 2}


def test_a_share_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "id": n}) + "\n" for n in range(400)))
    documents, _ = read(path, tmp_path, held_out=0.1)
    chosen = [d.id for d in documents if d.metadata["role"] == "held-out"]
    assert 20 < len(chosen) < 70
    assert chosen == [d.id for d in read(path, tmp_path, held_out=0.1)[0] if d.metadata["role"] == "held-out"]


def test_clean() -> None:
    assert clean("\n a \r\nb\rc\x00\x1f\t\n\n\n\nd\n") == " a\nb\nc\n\nd"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source src: .*: no files there"):
        read(tmp_path / "none.jsonl", tmp_path)
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.bin: what format is this\?"):
        read(tmp_path / "a.bin", tmp_path)


def test_files_are_shared_out_by_size(tmp_path: Path) -> None:
    for n, size in enumerate((100, 60, 50, 10)):
        (tmp_path / f"{n}.txt").write_text("x" * size)
    plan, *_ = inputs_of(Recipe("test", (Source(path="*.txt"),), tasks=2), tmp_path, None)
    assert [[Path(entry.path).name for entry in task] for task in plan] == [["0.txt", "3.txt"], ["1.txt", "2.txt"]]
