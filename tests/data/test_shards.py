"""Shards: what is written is read again, nothing half-written is visible, and damage is named."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.data import shards as shards_module
from qwen2.data.shards import Shards, ShardWriter, TokenizerInfo, merge, sha256_of

SMALL = TokenizerInfo("0" * 64, 300, 299)
LARGE = TokenizerInfo("1" * 64, 151_646, 151_643)
DOCUMENTS = [
    ("train", "en", "wiki", [1, 2, 3], 9),
    ("train", "zh", "wiki", [4], 3),
    ("held-out", "en", "udhr", [5, 6], 5),
    ("train", "en", "wiki", [], 0),
    ("train", "en", "code", [7, 8], 4),
]


def write(folder: Path, info: TokenizerInfo = SMALL, documents: list = DOCUMENTS, **options) -> Shards:
    with ShardWriter(folder, info, recipe={"name": "test"}, **options) as writer:
        for document in documents:
            writer.add(*document)
    return Shards.open(folder)


@pytest.mark.parametrize(
    ("info", "size"), [(SMALL, 2), (LARGE, 4), (replace(SMALL, vocabulary=65_536), 2), (replace(SMALL, vocabulary=65_537), 4)]
)
def test_what_is_written_is_read(info: TokenizerInfo, size: int, tmp_path: Path) -> None:
    shards = write(tmp_path, info)
    assert [(r.split, r.language, r.source, r.documents, r.tokens, r.bytes) for r in shards.shards] == [
        ("held-out", "en", "udhr", 1, 3, 5),
        ("train", "en", "code", 1, 3, 4),
        ("train", "en", "wiki", 2, 5, 9),
        ("train", "zh", "wiki", 1, 2, 3),
    ]
    wiki = shards.select("train", "en", "wiki")[0]
    assert [ids.tolist() for ids in shards.documents(wiki)] == [[1, 2, 3, info.end], [info.end]]
    assert (tmp_path / f"{wiki.name}.tokens").stat().st_size == 5 * size
    assert shards.documents(wiki).length(1) == 1
    assert shards.documents(wiki)[-1].tolist() == [info.end]
    with pytest.raises(IndexError):
        shards.documents(wiki)[2]
    assert shards.tokenizer == info
    assert json.loads((tmp_path / "manifest.json").read_text())["recipe"] == {"name": "test"}


@given(
    st.lists(
        st.tuples(st.sampled_from(["train", "held-out"]), st.sampled_from("ab"), st.lists(st.integers(0, 299), max_size=20)),
        min_size=1,
        max_size=30,
    )
)
@settings(max_examples=30)
def test_parts_joined_are_one(tmp_path_factory: pytest.TempPathFactory, documents: list) -> None:
    root = tmp_path_factory.mktemp("shards")
    rows = [(split, "en", source, ids, len(ids)) for split, source, ids in documents]
    one = write(root / "one", documents=rows)
    for number in range(3):
        write(root / str(number), documents=rows[len(rows) * number // 3 : len(rows) * (number + 1) // 3])
    joined = merge([root / str(number) for number in range(3)], root / "joined", {"name": "test"})
    assert joined.shards == one.shards
    assert (root / "joined" / "manifest.json").read_bytes() == (root / "one" / "manifest.json").read_bytes()


def test_a_large_shard_is_cut_between_documents(tmp_path: Path) -> None:
    shards = write(tmp_path, documents=[("train", "en", "x", [i] * 3, 3) for i in range(10)], shard_tokens=9)
    assert [r.documents for r in shards.shards] == [2] * 5
    assert [ids[0] for r in shards.shards for ids in shards.documents(r)] == list(range(10))
    assert len({r.name for r in shards.shards}) == 5


def test_sources_that_look_alike_stay_apart(tmp_path: Path) -> None:
    shards = write(tmp_path, documents=[("train", "en", "a b", [1], 1), ("train", "en", "a/b", [2], 1)])
    assert {r.source: shards.documents(r)[0].tolist() for r in shards.shards} == {"a b": [1, 299], "a/b": [2, 299]}


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ids from 1 to 300, the vocabulary has 300"):
        write(tmp_path, documents=[*DOCUMENTS, ("train", "en", "wiki", [1, 300], 2)])
    assert list(tmp_path.iterdir()) == []


def test_shards_are_not_written_over(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(FileExistsError, match="holds shards already"):
        write(tmp_path)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split 'test': there are train, held-out"):
        write(tmp_path / "a", documents=[("test", "en", "x", [1], 1)])
    with pytest.raises(ValueError, match="stored as uint16, not uint32"):
        ShardWriter(tmp_path / "b", SMALL, np.uint32)
    with pytest.raises(ValueError, match="end id 300"):
        ShardWriter(tmp_path / "c", replace(SMALL, end=300))
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json here"):
        Shards.open(tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    name = write(tmp_path).select("train", "en", "wiki")[0].name
    tokens, ends = tmp_path / f"{name}.tokens", tmp_path / f"{name}.ends"
    whole, places = tokens.read_bytes(), ends.read_bytes()
    tokens.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{name}\.tokens: has 9 bytes, manifest.json says 10: it was cut short"):
        Shards.open(tmp_path, verify=False)
    tokens.write_bytes(b"\x09" + whole[1:])
    with pytest.raises(ValueError, match=rf"{name}\.tokens: its sha256 is not"):
        Shards.open(tmp_path)
    tokens.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}\.tokens: listed in manifest.json but gone"):
        Shards.open(tmp_path)
    tokens.write_bytes(whole)
    ends.write_bytes(np.array([4, 4], "<u8").tobytes())
    with pytest.raises(ValueError, match=rf"{name}\.ends: its offsets do not rise"):
        Shards.open(tmp_path, verify=False)
    ends.write_bytes(places)
    assert len(Shards.open(tmp_path).shards) == 4


def test_hashes_are_remembered_while_files_are_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(shards_module, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))

    def names(**how: bool) -> list[str]:
        read.clear()
        Shards.open(tmp_path, **how)
        return sorted(read)

    name = write(tmp_path).select("train", "en", "wiki")[0].name
    whole = names()
    assert names(remember=True) == names(remember=True) == whole  # written just now: another writing might have the same time
    for path in tmp_path.glob("*.*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    assert names(remember=True) == whole
    assert names(remember=True) == []
    assert names() == whole
    tokens = tmp_path / f"{name}.tokens"
    tokens.write_bytes(b"\x09" + tokens.read_bytes()[1:])
    with pytest.raises(ValueError, match=rf"{name}\.tokens: its sha256 is not"):
        Shards.open(tmp_path, remember=True)
    (tmp_path / ".verified.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{name}\.tokens: its sha256 is not"):
        Shards.open(tmp_path, remember=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"shards": None}, "not a manifest of shards"),
        ({"tokenizer": {"sha256": "0"}}, "an entry has sha256, vocabulary, end"),
        ({"tokenizer": {"sha256": "0", "vocabulary": -1, "end": 0}}, "vocabulary is -1"),
        (
            {
                "shards": [
                    {
                        "name": "../x",
                        "split": "train",
                        "language": "en",
                        "source": "x",
                        "documents": 0,
                        "tokens": 0,
                        "bytes": 0,
                        "sha256_tokens": "",
                        "sha256_ends": "",
                    }
                ]
            },
            "no name of a shard",
        ),
    ],
)
def test_a_wrong_manifest_is_named(change: dict, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        Shards.open(tmp_path)


def test_a_manifest_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a manifest"):
        Shards.open(tmp_path)
    assert sha256_of(tmp_path / "manifest.json") == "021fb596db81e6d02bf3d2586ee3981fe519f275c0ac9ca76bbcf2ebb4097d96"
