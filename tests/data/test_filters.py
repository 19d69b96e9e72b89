"""Languages and heuristics: all 29 languages pass, and what breaks a rule is dropped by that rule."""

from __future__ import annotations

from pathlib import Path

import pytest
from datatrove.data import Document

from qwen2.data.filters import LanguageFilter, broken_rule
from qwen2.data.languages import LANGUAGES, choose, detect
from qwen2.data.recipe import Recipe, Source
from qwen2.data.steps import DETECTED
from qwen2.data.units import Text

ENGLISH = "It is the duty of all who are here to see that this is done, and that nobody is left behind by it. " * 1
RECIPE = Recipe("test", (Source(path="x"),))


def test_all_29_languages_are_told_apart(articles: dict[str, list[str]]) -> None:
    assert list(articles) == list(LANGUAGES)
    assert len(LANGUAGES) == 29
    found = {code: choose(detect("\n".join(paragraphs)), 0.5) for code, paragraphs in articles.items()}
    assert found == {code: code for code in LANGUAGES}


def test_malay_and_indonesian_paragraphs(articles: dict[str, list[str]]) -> None:
    """lid.176 alone finds two of ten Malay paragraphs."""
    for code in ("id", "ms"):
        right = sum(next(iter(detect(paragraph))) == code for paragraph in articles[code])
        assert right >= 6, code


@pytest.mark.parametrize("text", ["", "123 456", "... !!"])
def test_a_text_without_letters_has_no_language(text: str) -> None:
    assert detect(text) == {}
    assert choose(detect(text), 0.0) is None


def test_other_languages_are_not_among_the_29() -> None:
    assert choose(detect("Kaikki ihmiset syntyvat vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan."), 0.3) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Too short.", "too short"),
        ("word " * 300_000, "too long"),
        (" . ".join("abc" for _ in range(60)) + "." * 400, "too few letters"),
        ("The house 1234 and garden 5678 of village 1234 are in market 1234 for winter 5678, " * 2, "too many digits"),
        ("The <and> + of = to | in ~ is ^ that $ for + with = are < this > be ` on | by + or = you + the + and = of + to < in > is that " * 2, "too many symbols"),
        ("\u0431\u043e\u043b\u044c\u0448\u0435 \u043d\u0435 " * 20, "not the language's script"),
        (ENGLISH + "x" * 90 + " and that is all of it that there is to say on this.", "a word too long"),
        ("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4, "words too short or too long"),
        ("lorem ipsum dolor sit amet consectetur adipiscing elit sed eiusmod tempor incididunt labore magna aliqua enim minim veniam quis nostrud", "too few common words"),
        ("\n".join([ENGLISH, "This is the menu of the page."] + ["This is the menu of the page."] * 9), "repeated lines"),
        (ENGLISH * 6, "repeated runs of words"),
    ],
)  # fmt: skip
def test_each_rule_drops_what_breaks_it(text: str, rule: str) -> None:
    assert broken_rule(Text(text), "en", RECIPE.limits("en")) == rule


def test_thresholds_differ_by_language() -> None:
    recipe = Recipe("test", (Source(path="x"),), thresholds={"*": {"least_bytes": 10}, "lo": {"least_bytes": 500}})
    assert recipe.limits("en").least_bytes == 10
    assert recipe.limits("lo").least_bytes == 500


def test_the_language_filter(articles: dict[str, list[str]], tmp_path: Path) -> None:
    step = LanguageFilter(RECIPE, str(tmp_path))

    def document(language: str, role: str = "train", **likely: float) -> Document:
        return Document("\n".join(articles["de"]), "1", metadata={"language": language, "source": "x", "role": role, **likely})

    assert step.look(document("de")) is None
    assert step.look(document("fr")) == "not the declared language"
    assert step.look(document("de", **{DETECTED: 0.6})) is None
    assert step.look(document("de", **{DETECTED: 0.4})) == "no language found"
    assert step.look(document("?", **{DETECTED: 0.0})) == "no language found"
    assert step.concerns(document("de", "held-out", **{DETECTED: 0.6}))
    assert not step.concerns(document("fr", "held-out")), "declared and held out: as it is"
