"""The whole chain: every planted copy and evaluation item is found and nothing else goes, and the bytes do not depend on how."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from qwen2.cli.app import main
from qwen2.data.duplicates import NearFilter
from qwen2.data.execute import Place
from qwen2.data.fetch import fetch
from qwen2.data.prepare import clean_texts, prepare_text
from qwen2.data.recipe import Recipe, Source, read_recipe
from qwen2.data.report import gather
from qwen2.data.shards import Shards
from qwen2.data.tokens import prepare_shards
from qwen2.tokenizer.parts import END_OF_TEXT
from qwen2.weights.locks import alone

WORDS = [
    "time",
    "people",
    "water",
    "light",
    "house",
    "stone",
    "river",
    "garden",
    "winter",
    "summer",
    "letter",
    "music",
    "paper",
    "market",
    "village",
    "mountain",
    "doctor",
    "teacher",
    "window",
    "bridge",
]
LINKS = ["the", "of", "and", "to", "in", "that", "is", "for", "with", "on", "by", "this", "are", "be"]


def prose(seed: int, sentences: int = 9) -> str:
    """Made-up English of 9 sentences with its own vocabulary, so that no two texts are alike by chance."""
    draw = random.Random(seed)
    own = ["".join(draw.choice("bcdfglmnprst") + draw.choice("aeiou") for _ in range(3)) for _ in range(60)]
    lines = []
    for _ in range(sentences):
        words = [draw.choice(LINKS) if n % 2 else draw.choice(own if draw.random() < 0.8 else WORDS) for n in range(14)]
        lines.append(" ".join(words).capitalize() + ".")
    return "\n".join(lines)


def near(text: str) -> str:
    """One word of 126 changed, so 0.92 of the runs of five words are shared, and the sentences joined to one paragraph."""
    words = text.split()
    return " ".join("other" if n == 60 else word for n, word in enumerate(words))


UNIQUE = {f"unique-{n}": prose(n) for n in range(60)}
ITEMS = [prose(1000 + n, 2) for n in range(3)]
COPIES = {
    "exact": prose(0),
    "re-cased": prose(1).upper().replace(".", " !"),
    "near": near(prose(2)),
    "near-re-cased": near(prose(3)).upper(),
    "paragraphs": "\n".join([*prose(4).split("\n")[:5], *prose(5).split("\n")[2:6]]),  # cut from two others
}
CONTAMINATED = {
    "item": f"{prose(50_000)}\n{ITEMS[0]}\n{prose(50_001)}",
    "item-cut": prose(50_002) + "\n" + " ".join(ITEMS[1].split()[4:24]),
    "item-re-cased": ITEMS[2].upper().replace(".", ";") + "\n" + prose(50_003),
}
FALSE_HITS = {  # what looks a little like a copy, and is none
    "same-first-line": prose(6).split("\n")[0] + "\n" + prose(60_000),
    "half-an-item": prose(60_001) + "\n" + " ".join(ITEMS[0].split()[:8]),
}
PERSONAL = {"personal": prose(70_000) + "\nWrite to jane@acme.org or call +49 30 901820-11."}


def write_corpus(folder: Path) -> Recipe:
    folder.mkdir()
    everything = {**UNIQUE, **COPIES, **CONTAMINATED, **FALSE_HITS, **PERSONAL}
    rows = [json.dumps({"id": name, "text": text, "language": "en"}) for name, text in everything.items()]
    rows[30:30] = ['{"text": ""}', "not json"]
    (folder / "web.jsonl").write_text("\n".join(rows[:40]) + "\n")
    (folder / "more.jsonl").write_text("\n".join(rows[40:]) + "\n")
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": item}) + "\n" for item in ITEMS))
    (folder / "held.jsonl").write_text(json.dumps({"text": prose(90_000), "id": "h", "language": "en"}) + "\n")
    sources = (
        Source(path="web.jsonl"), Source(path="more.jsonl"), Source(path="test.jsonl", role="evaluation"),
        Source(path="held.jsonl", role="held-out"),
    )  # fmt: skip
    thresholds = {"*": {"language": 0.0, "declared": 0.0, "quality": 0.0}}
    return Recipe("test", sources, thresholds=thresholds, tasks=3)


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    root = tmp_path_factory.mktemp("data")
    recipe = write_corpus(root / "corpus")
    (root / "corpus" / "recipe.json").write_text(json.dumps(recipe.to_json()))
    manifest = prepare_text(recipe, root / "corpus", None, root / "one", say=quiet)
    write_tokenizer(root / "tok")
    prepare_shards(recipe, manifest, root / "one", root / "tok", Place(workers=1), quiet)
    return recipe, root


def write_tokenizer(folder: Path) -> None:
    """One token per byte: enough for shards."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))


def kept(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted([*folder.glob("text/*.jsonl"), *folder.glob("held-out/*.jsonl")]):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[row["id"].partition(":")[2]] = row["text"]
    return found


def test_every_copy_is_found_and_no_other_document_goes(prepared: tuple[Recipe, Path]) -> None:
    texts = kept(prepared[1] / "one")
    found = {**{name: UNIQUE[name] for name in UNIQUE}, **COPIES, **CONTAMINATED, **FALSE_HITS, **PERSONAL}
    assert sorted(found.keys() - texts.keys()) == sorted([*COPIES, *CONTAMINATED])
    assert {name for name, text in UNIQUE.items() if texts[name] != text} == set(), "originals stay whole"
    assert texts["same-first-line"] == FALSE_HITS["same-first-line"].partition("\n")[2], "the copied paragraph alone is taken out"
    assert texts["half-an-item"] == FALSE_HITS["half-an-item"]
    assert texts["personal"].endswith("Write to <email> or call <phone>.")
    assert texts["h"] == prose(90_000), "held-out text is as it was"


def test_the_report_says_what_went_and_why(prepared: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]) -> None:
    steps = {step["step"]: step for step in gather(prepared[1] / "one")["steps"]}
    reasons = {name: {r: c["documents"] for r, c in step["outcomes"].items() if r != "kept"} for name, step in steps.items()}
    assert reasons["read"] == {"empty": 1, "not readable": 1}
    assert reasons["exact"] == {"copied paragraphs": 1, "copy of a document": 2}
    assert reasons["near"] == {"near copy": 2}
    assert reasons["contamination"] == {"holds an item of test": 3}
    sample = steps["contamination"]["samples"]["holds an item of test"][0]
    assert sample["text"][:20] in "".join(CONTAMINATED.values())
    assert main(["data", "report", str(prepared[1] / "one")]) == 0
    assert "near copy 2" in capsys.readouterr().out
    assert (prepared[1] / "one" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((prepared[1] / "one" / "report.json").read_text())["quality"]["held_out"] > 0


def test_twice_and_by_two_workers_the_same_bytes(prepared: tuple[Recipe, Path]) -> None:
    recipe, root = prepared
    manifest = prepare_text(recipe, root / "corpus", None, root / "two", Place(workers=2), quiet)
    prepare_shards(recipe, manifest, root / "two", root / "tok", Place(workers=2), quiet)
    for folder in ("text", "held-out", "shards", "shards/tokenizer"):
        names = sorted(path.name for path in (root / "one" / folder).iterdir() if path.is_file())
        assert names == sorted(path.name for path in (root / "two" / folder).iterdir() if path.is_file())
        for name in names:
            assert (root / "one" / folder / name).read_bytes() == (root / "two" / folder / name).read_bytes(), name
    assert gather(root / "one") == gather(root / "two")


def test_the_manifest_makes_the_shards_again(prepared: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, root = prepared
    shutil.copy(root / "one" / "shards" / "manifest.json", root / "corpus" / "manifest.json")
    command = [
        "data",
        "prepare",
        str(root / "corpus" / "manifest.json"),
        str(root / "again"),
        "--tokenizer",
        str(root / "tok"),
        "--workers",
        "1",
    ]
    assert main(command) == 0
    assert (root / "again" / "shards" / "manifest.json").read_bytes() == (root / "one" / "shards" / "manifest.json").read_bytes()
    assert "shards" in capsys.readouterr().out
    assert main(command) == 0
    assert "used as they are" in capsys.readouterr().out


def test_shards_hold_the_text(prepared: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, root = prepared
    shards = Shards.open(root / "one" / "shards")
    assert {(r.split, r.language, r.source) for r in shards.shards} == {
        ("train", "en", "web"), ("train", "en", "more"), ("held-out", "en", "held"),
    }  # fmt: skip
    held = shards.select("held-out")[0]
    assert held.bytes == len(prose(90_000).encode()) == held.tokens - 1
    assert (root / "one" / "shards" / "tokenizer" / "tokenizer.json").read_bytes() == (root / "tok" / "tokenizer.json").read_bytes()
    assert [text for *_, text in clean_texts(root / "one", "held-out")] == [prose(90_000)]
    assert sum(r.documents for r in shards.select("train")) == len(kept(root / "one")) - 1
    assert dict.fromkeys(source for _, source, _ in clean_texts(root / "one")).keys() == {"web", "more"}
    assert (
        main(["data", "inspect", str(root / "one" / "shards"), "--tokenizer", str(root / "tok"), "--split", "held-out", "--samples", "1"])
        == 0
    )
    assert prose(90_000)[:100] in capsys.readouterr().out


def test_work_goes_on_after_a_stop(prepared: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, root = prepared
    from qwen2.data import prepare

    monkeypatch.setattr(prepare.ContaminationFilter, "begin", lambda self, rank: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_text(recipe, root / "corpus", None, root / "stopped", say=quiet)
    monkeypatch.undo()
    monkeypatch.setattr(prepare.ReadInputs, "run", lambda *_: pytest.fail("the first pipeline was finished"))
    prepare_text(recipe, root / "corpus", None, root / "stopped", say=quiet)
    assert kept(root / "stopped") == kept(root / "one")


def test_what_unfinished_work_left_is_not_counted_in(prepared: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at its end with three tasks, its work removed as the error says, then made with two and fewer steps."""
    recipe, root = prepared
    from qwen2.data import prepare

    monkeypatch.setattr(prepare, "sha256_of", lambda path, real=prepare.sha256_of: stop() if path.parent.name == "text" else real(path))
    with pytest.raises(KeyboardInterrupt):
        prepare_text(recipe, root / "corpus", None, root / "left", say=quiet)
    monkeypatch.undo()
    other = Recipe.from_json({**recipe.to_json(), "tasks": 2, "steps": ["exact", "near"]}, "x")
    with pytest.raises(FileExistsError, match=r"left/work: unfinished work of another recipe or other inputs; remove it or name another"):
        prepare_text(other, root / "corpus", None, root / "left", say=quiet)
    shutil.rmtree(root / "left" / "work")
    assert prepare_text(other, root / "corpus", None, root / "left", say=quiet) == prepare_text(
        other, root / "corpus", None, root / "anew", say=quiet
    )
    assert [step["step"] for step in gather(root / "left")["steps"]] == ["read", "exact", "near"]
    assert gather(root / "left") == gather(root / "anew")


def stop() -> str:
    raise KeyboardInterrupt


def test_no_input_is_written_over(prepared: tuple[Recipe, Path], tmp_path: Path) -> None:
    _, root = prepared
    place = tmp_path / "text" / "00000.jsonl"
    place.parent.mkdir()
    shutil.copyfile(root / "corpus" / "web.jsonl", place)
    recipe = Recipe("test", (Source(path="text/*.jsonl"),), steps=("exact",), tasks=1)
    with pytest.raises(ValueError, match=r"text/00000\.jsonl: an input of this recipe lies where its clean text is written; name another"):
        prepare_text(recipe, tmp_path, None, tmp_path, say=quiet)
    assert place.read_bytes() == (root / "corpus" / "web.jsonl").read_bytes()


@pytest.mark.parametrize("kind", ["Classifier", "Index"])
def test_a_kill_while_a_filter_is_made_ready(
    kind: str, prepared: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is half there: the same call makes it again, and does not take it for whole."""
    recipe, root = prepared
    from qwen2.data.contamination import Index
    from qwen2.data.quality import Classifier

    def killed(self: object, path: Path) -> None:
        path.write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr({"Classifier": Classifier, "Index": Index}[kind], "save", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_text(recipe, root / "corpus", None, tmp_path / "out", say=quiet)
    monkeypatch.undo()
    prepare_text(recipe, root / "corpus", None, tmp_path / "out", say=quiet)
    assert kept(tmp_path / "out") == kept(root / "one")


def test_a_kill_while_work_is_removed_brings_no_copies_back(prepared: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, root = prepared
    from qwen2.data import prepare

    real = shutil.rmtree

    def killed(path: Path, **options: bool) -> None:
        if not options:
            real(Path(path) / "near")
            real(Path(path) / "logs" / "second")
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_text(recipe, root / "corpus", None, root / "killed", say=quiet)
    monkeypatch.undo()
    assert not (root / "killed" / "work").exists(), "there is nothing that looks like work to go on with"
    prepare_text(recipe, root / "corpus", None, root / "killed", say=quiet)
    assert kept(root / "killed") == kept(root / "one")
    assert sorted(path.name for path in (root / "killed").iterdir() if path.is_dir()) == ["counts", "held-out", "text"]


def test_flags_that_are_gone_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"000003\.remove: gone, though the step that writes it is finished; remove {tmp_path.parent}"):
        NearFilter(str(tmp_path), str(tmp_path)).begin(3)


def test_one_process_at_a_time(prepared: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, root = prepared
    with alone(tmp_path / "out", "qwen2 data prepare"):
        with pytest.raises(ValueError, match="out: another qwen2 data prepare works in this folder; wait for it, or name another"):
            prepare_text(recipe, root / "corpus", None, tmp_path / "out", say=quiet)
        with pytest.raises(ValueError, match="another qwen2 data prepare"):
            prepare_shards(recipe, {}, tmp_path / "out", root / "tok", Place(workers=1), quiet)
        with pytest.raises(ValueError, match="another qwen2 data fetch"):
            fetch({"udhr": 0}, tmp_path / "out", say=quiet)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock"] == []


def test_evaluation_items_that_do_not_read_are_in_the_report(prepared: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, root = prepared
    shutil.copytree(root / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus" / "test.jsonl").write_text(json.dumps({"text": ITEMS[0]}) + "\nnot json\n")
    few = Recipe.from_json({**recipe.to_json(), "steps": ["contamination"]}, "x")
    prepare_text(few, tmp_path / "corpus", None, tmp_path / "out", say=quiet)
    rows = gather(tmp_path / "out")["steps"][0]["by_language_and_source"]
    assert {"language": "?", "source": "test", "dropped_documents": 1, "dropped_bytes": 0} in rows


def test_a_folder_belongs_to_one_recipe(prepared: tuple[Recipe, Path]) -> None:
    recipe, root = prepared
    other = Recipe.from_json({**recipe.to_json(), "seed": 5}, "x")
    with pytest.raises(FileExistsError, match="holds text of another recipe"):
        prepare_text(other, root / "corpus", None, root / "one", say=quiet)
    shutil.copytree(root / "one", root / "altered")
    path = next((root / "altered" / "text").glob("*.jsonl"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FileExistsError, match="or was altered"):
        prepare_text(recipe, root / "corpus", None, root / "altered", say=quiet)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "nothing", "out"], "nothing: no such recipe"),
        (["prepare", "quick", "out", "--corpus", "nowhere"], "fetch it with qwen2 data fetch mediawiki"),
        (["prepare", "quick", "out", "--workers", "0"], "--workers 0: must be at least 1"),
        (["inspect", "nowhere"], "no manifest.json here"),
        (["report", "nowhere"], "nothing was prepared here"),
        (["fetch"], "name packages or recipes"),
        (["fetch", "nothing"], "nothing: not in the table"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *words]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_table_of_corpora(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", "--list"]) == 0
    assert "libreoffice-help-de" in capsys.readouterr().out
    assert read_recipe("quick")[0].name == "quick"
