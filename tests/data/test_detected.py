"""Texts of unknown languages: every document gets one as it is read, held-out ones too, and shares, counts and shards go by it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from qwen2.data.execute import Place
from qwen2.data.prepare import prepare_text
from qwen2.data.readers import ReadInputs
from qwen2.data.recipe import Recipe, Source
from qwen2.data.report import gather, left_by_language, show
from qwen2.data.sources import inputs_of
from qwen2.data.tokens import prepare_shards
from tests.data.test_prepare import quiet, write_tokenizer

CODES = ("en", "de", "ru", "zh", "th")
NO_LANGUAGE = "1234 5678 . 90"
FINNISH = "Kaikki ihmiset syntyv\u00e4t vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu j\u00e4rki ja omatunto."


@pytest.fixture(scope="module")
def crawl(articles: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight documents of two paragraphs in each of five languages, and others in none of ours."""
    texts = [f"{code}-{n}\n" + "\n".join(articles[code][n : n + 2]) for n in range(8) for code in CODES]
    path = tmp_path_factory.mktemp("detected") / "crawl.jsonl"
    rows = [{"id": n, "text": text} for n, text in enumerate([*texts, *(f"{NO_LANGUAGE} {n}" for n in range(12)), FINNISH])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(crawl: Path, **source: object) -> Recipe:
    return Recipe("test", (Source(path=crawl.name, language="detect", **source),), steps=("language",), tasks=2)  # type: ignore[arg-type]


def test_held_out_documents_get_their_language_too(crawl: Path, tmp_path: Path) -> None:
    recipe = recipe_of(crawl, held_out=0.5)
    manifest = prepare_text(recipe, crawl.parent, None, tmp_path / "out", say=quiet)
    write_tokenizer(tmp_path / "tok")
    shards = prepare_shards(recipe, manifest, tmp_path / "out", tmp_path / "tok", Place(workers=1), quiet)
    assert {record.language for record in shards.select("held-out")} == {record.language for record in shards.select("train")} == set(CODES)
    counted = Counter[str]()
    for record in shards.shards:
        counted[record.language] += record.documents
    assert counted == dict.fromkeys(CODES, 8)
    step = gather(tmp_path / "out")["steps"][1]
    assert step["outcomes"]["no language found"]["documents"] == 13, "also those that are held out: nothing can be measured on them"
    assert {row["language"] for row in step["by_language_and_source"]} == {*CODES, "?"}


def test_the_report_knows_their_languages_from_the_start(crawl: Path, tmp_path: Path) -> None:
    prepare_text(recipe_of(crawl), crawl.parent, None, tmp_path / "out", say=quiet)
    report = gather(tmp_path / "out")
    first, last = left_by_language(report)[0], left_by_language(report)[-1]
    assert all(first[code] == last[code] > 0 for code in CODES)
    assert first["?"] > 0 == last["?"]
    *_, line = show(tmp_path / "out")
    assert [part.split(" ")[0] for part in line.split("  ")[:-1]] == ["en", "zh", "de", "ru", "th", "?"]


def test_languages_that_are_declared_and_not_ours_are_not_lost_to_the_report(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": FINNISH, "language": "fi"}) + "\n")
    said: list[str] = []
    prepare_text(Recipe("test", (Source(path="a.jsonl"),), steps=("exact",), tasks=1), tmp_path, None, tmp_path / "out", say=said.append)
    assert said[0].startswith("reading 1 file: ")
    assert left_by_language(gather(tmp_path / "out"))[-1] == {"?": len(FINNISH.encode())}


def test_a_share_is_of_each_language(crawl: Path, tmp_path: Path) -> None:
    plan, *_ = inputs_of(recipe_of(crawl, most_bytes=1), crawl.parent, None)
    kept = [document.metadata["language"] for task in plan for document in ReadInputs([task], str(tmp_path)).run()]
    assert sorted(kept) == sorted([*CODES, "?"])
