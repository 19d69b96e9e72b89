"""Thresholds of each of the 29 languages: its clean text keeps the rules, the same text damaged breaks the right one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qwen2.cli.app import main
from qwen2.data.filters import POINTS, SCRIPT, broken_rule, common_count
from qwen2.data.languages import LANGUAGES
from qwen2.data.norms import WORDS, common_words, pieces
from qwen2.data.recipe import Recipe, Source, Thresholds, norms
from qwen2.data.units import Text

RECIPE = Recipe("test", (Source(path="x"),))
COMMON, SYMBOLS, DIGITS, ALPHABET = "too few common words", "too many symbols", "too many digits", "not the language's script"
each_language = pytest.mark.parametrize("code", LANGUAGES)
Articles = dict[str, list[str]]


def rule(text: str, code: str) -> str | None:
    return broken_rule(Text(text), code, RECIPE.limits(code))


def parts(text: str) -> list[str]:
    """Words, or six characters at a time where words are not written apart."""
    words = text.split()
    return words if len(words) * 15 > len(text) else [text[i : i + 6].strip() for i in range(0, len(text), 6)]


def ciphered(text: str, code: str) -> str:
    """Each letter become another, in Chinese and Japanese one of all Chinese characters: script and lengths stay, no word does."""
    letters = sorted({c for c in text if c.isalpha()})
    turned = [chr(0x4E00 + ord(c) * 7919 % 20000) for c in letters] if code in ("zh", "ja") else letters[7:] + letters[:7]
    return text.translate(dict(zip(map(ord, letters), turned, strict=True)))


def test_each_language_has_its_own_norms() -> None:
    found = norms()
    assert list(found) == list(LANGUAGES)
    for code, limits in found.items():
        words = [int(Text(word).units[0]) for word in limits["words"].split()]
        assert len(set(words)) == WORDS, code
        assert limits.keys() <= set(Thresholds.__dataclass_fields__), code
        assert 0.01 < limits["stop_words"] <= 0.12, code
    assert len({tuple(limits["mean_unit"]) for limits in found.values()}) > 20
    assert len({limits["least_bytes"] for limits in found.values()}) > 20
    for code in ("th", "lo", "my", "km", "hi"):
        assert found[code]["least_bytes"] > 2 * found["en"]["least_bytes"], "what English says in a byte takes two or three"


@each_language
def test_clean_text_passes(code: str, articles: Articles) -> None:
    assert rule("\n".join(articles[code]), code) is None
    for paragraph in articles[code]:
        assert rule(paragraph, code) in (None, "too short"), paragraph


@each_language
def test_what_is_no_word_of_the_language(code: str, articles: Articles) -> None:
    assert rule(ciphered("\n".join(articles[code]), code), code) == COMMON


@each_language
def test_words_among_those_of_another_language(code: str, articles: Articles) -> None:
    """One word in eight is the language's. Where the script is another one that says it; where it is not, the common words do."""
    other, reason = {"vi": "id", "pl": "de", "tr": "id", "id": "de", "ms": "de", "fa": "ar", "ur": "ar"}.get(code, "vi"), COMMON
    if code == "vi":
        reason = "words too short or too long"  # of one syllable each in Vietnamese
    elif SCRIPT.get(code) != SCRIPT.get(other):
        reason = ALPHABET
    own, others = parts("\n".join(articles[code])), parts("\n".join(articles[other]))
    mixed = [own[i % len(own)] if i % 8 == 0 else word for i, word in enumerate(others)]
    random.Random(0).shuffle(mixed)
    assert rule(" ".join(mixed), code) == reason


@each_language
def test_scraps_of_a_menu(code: str, articles: Articles) -> None:
    scraps = parts("\n".join(articles[code]))[:60]
    assert rule(" | ".join(scraps), code) == SYMBOLS
    assert rule("\n".join(f"[+] {scrap} > (3)" for scrap in scraps), code) in (SYMBOLS, DIGITS)


@each_language
def test_letters_replaced_by_digits(code: str, articles: Articles) -> None:
    text, draw = "\n".join(articles[code]), random.Random(0)
    assert rule("".join(str(draw.randrange(10)) if c.isalpha() and draw.random() < 0.6 else c for c in text), code) == DIGITS


@each_language
def test_text_of_a_wrong_encoding(code: str, articles: Articles) -> None:
    """Letters of Latin as halves of Chinese characters; letters of other scripts, and Vietnamese, as two or three of Latin each."""
    data = "\n".join(articles[code]).encode()
    if code in SCRIPT or code == "vi":
        assert rule(data.decode("cp1252", "replace"), code) in (SYMBOLS, DIGITS, ALPHABET, "too few letters")
    else:
        assert rule(data.decode("utf-16-le", "replace"), code) == ALPHABET


@each_language
def test_the_same_over_and_over(code: str, articles: Articles) -> None:
    """And a long text, whose words come again but not in the same order, is not taken for that."""
    paragraph = " ".join(articles[code][:4])
    assert rule(" ".join([paragraph] * 4), code) == "repeated runs of words"


def test_a_recipe_changes_the_words_and_the_shares() -> None:
    recipe = Recipe("test", (Source(path="x"),), thresholds={"de": {"words": "eins zwei", "stop_words": 0.5}, "*": {"run": 3}})
    assert recipe.limits("de").words == "eins zwei"
    assert recipe.limits("fr").words == norms()["fr"]["words"]
    assert recipe.limits("th").run == 3
    text = Text("Eins und zwei und drei sind alle Worte, die hier stehen sollen, sonst ist nichts weiter da.")
    assert broken_rule(text, "de", recipe.limits("de")) == COMMON


def test_vowel_points_do_not_hide_words() -> None:
    """Arabic as the Quran is written: from, in, with their vowels; neither word stands in the list so."""
    pointed = "\u0645\u0650\u0646\u064e \u0641\u0650\u064a"
    assert common_count(Text(pointed), "\u0645\u0646 \u0641\u064a") == 2
    assert POINTS.sub("", pointed) == "\u0645\u0646 \u0641\u064a"


def test_common_words_are_those_of_all_sources() -> None:
    manual = ["press the key and the printer starts " * 30, "press 12 keys of the board " * 30]
    tale = ["the wolf and the girl went into the wood " * 40]
    assert common_words([manual, tale], ("latin",))[:2] == ["the", "and"]
    assert "12" not in common_words([manual, tale], ("latin",))
    assert "wolf" not in common_words([["the end "] * 3, manual], ("latin",))


def test_pairs_of_clusters_are_spelled(articles: Articles) -> None:
    for code in ("th", "my", "en", "zh"):
        text = Text(articles[code][0])
        for i in range(len(text.units)):
            assert Text(text.spelled(i)).units[0] == text.units[i]


def test_pieces_are_the_text(articles: Articles) -> None:
    text = "\n".join(articles["en"] * 9)
    found = list(pieces(text))
    assert "\n".join(found) == text
    assert len(found) > 3
    assert min(map(len, found)) >= 1000


def test_norms_are_measured(articles: Articles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a corpus of three languages; what comes out is thresholds of a recipe."""
    for name in ("udhr", "more"):
        rows = [{"text": "\n".join(articles[code][:: 1 if name == "udhr" else -1]), "language": code} for code in ("en", "de", "th")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.json").write_text(json.dumps({"name": "r", "sources": [{"path": "udhr.jsonl"}, {"path": "more.jsonl"}]}))
    main(["data", "norms", str(tmp_path / "r.json"), str(tmp_path / "new" / "out.json")])
    assert "3 languages" in capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "out.json").read_text(encoding="utf-8"))
    assert list(found) == ["en", "de", "th"]
    assert {"the", "of", "and"} <= set(found["en"]["words"].split())
    assert found["en"]["least_bytes"] == 45 < found["th"]["least_bytes"]
    assert Recipe("test", (Source(path="x"),), thresholds=found).limits("de").words.startswith(found["de"]["words"][:3])
