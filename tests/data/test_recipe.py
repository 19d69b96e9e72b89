"""Recipes: what is unknown or wrong is an error that names it; ours read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2.data.languages import LANGUAGES
from qwen2.data.packages import PACKAGES
from qwen2.data.recipe import Recipe, built_in, read_recipe

SOURCE = {"path": "a.jsonl"}


def test_ours_read_and_come_back() -> None:
    assert list(built_in()) == ["base", "quick"]
    for name in built_in():
        recipe, _ = read_recipe(name)
        assert Recipe.from_json(recipe.to_json(), "x") == recipe
        assert any(PACKAGES[source.package].role == "held-out" for source in recipe.sources)


def test_held_out_packages_cover_all_languages() -> None:
    from qwen2.data.packages import UDHR

    assert sorted(UDHR.values()) == sorted(LANGUAGES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sorces": []}, "'sorces' is unknown: there are name, sources"),
        ({"sources": []}, "a recipe needs sources"),
        ({"sources": [{"path": "a", "colour": 1}]}, "'colour' is unknown"),
        ({"sources": [{}]}, "give either package or path"),
        ({"sources": [{"path": "a", "package": "udhr"}]}, "give either package or path"),
        ({"sources": [{"package": "nothing"}]}, "source 'nothing': not in the table"),
        ({"sources": [{"path": "a", "language": "xx"}]}, "language 'xx': there are detect, en"),
        ({"sources": [{"path": "a", "format": "pdf"}]}, "format 'pdf': there are html, jsonl"),
        ({"sources": [{"path": "a", "role": "test"}]}, "role 'test': there are train, held-out, evaluation"),
        ({"sources": [{"path": "x/a.txt"}, {"path": "y/a.txt"}]}, "two sources are called 'a'"),
        ({"steps": ["exact", "magic"]}, "step 'magic': there are language"),
        ({"tasks": 0}, "tasks 0: must be at least 1"),
        ({"tasks": "4"}, "tasks is '4', it takes int"),
        ({"seed": True}, "seed is 'True', it takes int"),
        ({"thresholds": {"xx": {}}}, "thresholds for 'xx'"),
        ({"thresholds": {"en": {"letter": 1}}}, "threshold 'letter': there are least_bytes"),
        ({"thresholds": {"*": {"letters": "many"}}}, "threshold letters: 'many' is not a number"),
        ({"thresholds": {"th": {"words": ["a"]}}}, "threshold words: "),
        ({"thresholds": {"th": {"words": "a 1"}}}, "threshold words: 'a 1' is not words"),
        ({"thresholds": {"th": {"run": 0}}}, "threshold run: 0 is not a whole number"),
        ({"weights": {"en": 1}}, "weight 'en': write language/source"),
        ({"weights": {"xx/a": 1}}, "weight of xx/a: language 'xx': there are \\*, en"),
        ({"weights": {"en/b": 1}}, "weight of en/b: source 'b': there are \\*, a"),
        ({"temperature": 0}, "temperature 0: must be above 0"),
    ],
)
def test_what_is_wrong_is_named(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"name": "x", "sources": [SOURCE], **change}))
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such recipe; ours are base, quick"):
        read_recipe("nothing")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_recipe(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="sources is missing"):
        read_recipe(tmp_path / "a.json")
