"""`qwen2 tokenizer`: learn, compare with a picture, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qwen2.cli.app import main
from qwen2.tokenizer import Tokenizer


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    lines = [{"text": f"the cat sat on mat {i}", "language": "en"} for i in range(30)]
    lines += [{"text": f"die Katze sitzt auf der Matte {i}", "language": "de"} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_train_and_compare(documents: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, picture = tmp_path / "words", tmp_path / "fit.svg"
    assert main(["tokenizer", "train", str(documents), "--vocab", "280", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0].split() == ["LANGUAGE", "TEXTS", "THERE", "LEARNED", "FROM"]
    assert said.out.splitlines()[-1] == f"{out}: 280 entries, learned from 920 B in 2 languages"
    assert said.err == ""
    assert Tokenizer.from_folder(out).vocab_size == 280
    words = ["tokenizer", "compare", str(out), str(tiny_folder), "--texts", str(documents)]
    assert main([*words, "--json", "--picture", str(picture)]) == 0
    fits = json.loads(capsys.readouterr().out)
    assert fits.keys() == {"de", "en"}
    assert fits["de"]["bytes_per_token"]["words"] == pytest.approx(fits["de"]["bytes"] / fits["de"]["tokens"]["words"])
    names = {element.get("id") for element in ElementTree.parse(picture).iter()}
    assert {"words", "tiny-qwen2"} <= names
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "mean"
    assert main([*words, "--picture", str(tmp_path)]) == 1
    assert f"{tmp_path}: is a folder; name the file to write" in capsys.readouterr().err


def test_too_little_text_for_the_size_is_said(documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["tokenizer", "train", str(documents), "--out", str(tmp_path / "t")]) == 0
    assert "entries, not 8,192: no more pairs occur 2 times; give more text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--out", "{new}"], "no texts: name files or folders to learn from"),
        (["train", "{texts}", "--out", "{folder}"], "{folder}: exists already; write the tokenizer into a new folder"),
        (["train", "{texts}", "--out", "{new}", "--vocab", "200"], "vocab 200: must be above 259"),
        (["train", "{new}", "--out", "{new}"], "{new}: no such file or folder"),
        (["compare", "--texts", "{texts}"], "no tokenizers: name folders, GGUF files or models"),
        (["compare", "{new}", "--texts", "{texts}"], "{new}: no such file or folder"),
    ],
)
def test_refusals(words: list[str], message: str, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    places = {"texts": documents, "folder": tmp_path, "new": tmp_path / "new"}
    assert main(["tokenizer", *(word.format(**places) for word in words)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qwen2: {message.format(**places)}")
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()
