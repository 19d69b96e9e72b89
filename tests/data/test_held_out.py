"""Held-out text stays out of the training text: whole documents too, whose lines are too short to be found one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2.data.execute import Place
from qwen2.data.prepare import prepare_text
from qwen2.data.recipe import Recipe, Source
from qwen2.data.report import gather, notes
from qwen2.data.tokens import prepare_shards
from tests.data.test_prepare import kept, prose, quiet, write_tokenizer

HELD_OUT = {
    "poem": "The house stands on the hill,\nand the river runs below,\nfor the people of the village\nare in the light of winter.",
    "talk": "A: Are you in the house with them?\nB: Yes, I am on the way to it.\nA: Good, that is what we want.\nB: And you?",
    "chinese": "\u5e8a\u524d\u660e\u6708\u5149\uff0c\u7591\u662f\u5730\u4e0a\u971c\u3002\n\u4e3e\u5934\u671b\u660e\u6708\uff0c\u4f4e\u5934\u601d\u6545\u4e61\u3002\n"
    "\u6625\u7720\u4e0d\u89c9\u6653\uff0c\u5904\u5904\u95fb\u557c\u9e1f\u3002",
    "short": "Who is it?\nIt is the wind.",  # fewer units than the report's rule needs
}  # fmt: skip
OTHERS = {
    "another-talk": "A: Is the market open?\nB: It is, until the bridge closes for the winter.\nA: Then we go there now.",
    "prose": prose(1),
}


def prepared(folder: Path, training: dict[str, str], *steps: str) -> tuple[set[str], dict[str, dict[str, int]]]:
    """Ids of training text that stays, and how many documents each step dropped for which reason."""
    for name, texts in (("train", training), ("held", HELD_OUT)):
        rows = [json.dumps({"text": text, "language": "en", "id": id}) + "\n" for id, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    sources = (Source(path="train.jsonl"), Source(path="held.jsonl", role="held-out"))
    prepare_text(Recipe("test", sources, steps=steps, tasks=2), folder, None, folder / "out", say=quiet)
    dropped = {
        step["step"]: {why: count["documents"] for why, count in step["outcomes"].items() if why != "kept"}
        for step in gather(folder / "out")["steps"]
    }
    assert HELD_OUT.keys() <= kept(folder / "out").keys()
    return {json.loads(line)["id"][6:] for path in folder.glob("out/text/*.jsonl") for line in path.read_text().splitlines()}, dropped


def test_copies_of_held_out_documents_go(tmp_path: Path) -> None:
    copies = {f"copy-{name}": text.upper().replace(",", " --") for name, text in HELD_OUT.items()}
    left, dropped = prepared(tmp_path, {**copies, **OTHERS}, "exact")
    assert left == OTHERS.keys()
    assert dropped["exact"] == {"copy of a held-out document": 4}


def test_pages_that_hold_a_held_out_document_go(tmp_path: Path) -> None:
    pages = {f"page-{name}": f"{prose(number)}\n{text}" for number, (name, text) in enumerate(HELD_OUT.items(), start=10)}
    cut = {"cut": HELD_OUT["poem"].rpartition("\n")[0]}
    left, dropped = prepared(tmp_path, {**pages, **cut, **OTHERS}, "contamination")
    assert left == OTHERS.keys() | {"page-short"}
    assert dropped["contamination"] == {"holds an item of held": 4}
    report = gather(tmp_path / "out")
    assert report["steps"][-1]["compared_with"] == {"held": {"items": 17, "too_short": 14}}, "documents and their lines"
    assert list(notes(report)) == ["contamination: compared with held (17 items, 14 too short to be compared)"]


@pytest.mark.parametrize("code", ["zh/Hans", "../zh", "\0", "zh " * 200, "\u4e2d"])
def test_a_language_that_no_file_can_be_called_ends_nothing(code: str, tmp_path: Path) -> None:
    rows = [json.dumps({"text": prose(n), "language": code, "id": n}) + "\n" for n in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    recipe = Recipe("test", (Source(path="a.jsonl", held_out=0.5),), steps=("exact",), tasks=2)
    manifest = prepare_text(recipe, tmp_path, None, tmp_path / "out", say=quiet)
    write_tokenizer(tmp_path / "tok")
    shards = prepare_shards(recipe, manifest, tmp_path / "out", tmp_path / "tok", Place(workers=1), quiet)
    assert {(record.split, record.language) for record in shards.shards} == {("train", code), ("held-out", code)}
    assert sum(record.documents for record in shards.shards) == 12
    assert {path.parent for path in (tmp_path / "out" / "shards").rglob("*.tokens")} == {tmp_path / "out" / "shards"}
