"""Units: what separates them, what they ignore, and that hashes of lines and runs follow from them alone."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.data.units import LETTER, PUNCTUATION, Text


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("Hello, World! don't", [5, 5, 3, 1]),
        ("", []),
        ("... --- !!!", []),
        ("b_c 42nd", [1, 1, 4]),
        ("\u4f60\u597d\u3002\u30ab\u30bf", [1, 1, 1, 1]),  # ideographs and kana alone
        ("\u0939\u093f\u0928\u094d\u0926\u0940 x", [6, 1]),  # marks belong to their word
        ("\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8", [3, 3]),
        ("\u0e01\u0e34\u0e19\u0e02\u0e49\u0e32\u0e27", [2, 1, 2, 1, 1]),  # Thai: clusters of a letter and its marks
        ("\U00020000\U0001f600a", [1, 1]),
    ],
)
def test_units_are_runs_of_letters(text: str, lengths: list[int]) -> None:
    assert Text(text).lengths.tolist() == lengths
    assert len(Text(text).units) == len(lengths)


def test_units_ignore_case_punctuation_and_spacing() -> None:
    one, other = Text("The Quick, brown FOX\u2014jumps."), Text("the quick brown fox  jumps")
    assert one.units.tolist() == other.units.tolist()
    assert one.whole_hash() == other.whole_hash()
    assert Text("fox brown quick the jumps").whole_hash() != one.whole_hash()
    assert Text("\uff28\uff45\uff4c\uff4c\uff4f").units.tolist() == Text("hello").units.tolist()  # NFKC


def test_neighbours_make_a_thai_unit() -> None:
    first, second = Text("\u0e01\u0e32\u0e19").units, Text("\u0e01\u0e32\u0e21").units
    assert first[0] == second[0]
    assert first[1] != second[1]


@given(st.text(alphabet="ab \n.", max_size=60))
def test_units_equal_a_plain_split(text: str) -> None:
    words = re.findall(r"[ab]+", text)
    known: dict[str, int] = {}
    assert [known.setdefault(word, int(unit)) for word, unit in zip(words, Text(text).units, strict=True)] == Text(text).units.tolist()
    assert len(set(known.values())) == len(known)
    assert Text(text).line_of_unit.tolist() == [n for n, line in enumerate(text.split("\n")) for _ in re.findall(r"[ab]+", line)]


@given(st.lists(st.sampled_from(["one two", "two one", "", "One; two.", "three"]), max_size=8))
def test_lines_are_hashed_by_their_units(lines: list[str]) -> None:
    numbers, hashes = Text("\n".join(lines)).line_hashes()
    assert numbers.tolist() == [n for n, line in enumerate(lines) if line]
    keys = {"one two": 0, "One; two.": 0, "two one": 1, "three": 2}
    expected = [keys[line] for line in lines if line]
    seen: dict[int, int] = {}
    assert [seen.setdefault(key, int(value)) for key, value in zip(expected, hashes, strict=True)] == hashes.tolist()
    assert len(set(seen.values())) == len(seen)


def test_shingles_are_runs() -> None:
    first, second = Text("a b c d e f"), Text("x b c d e f g")
    assert len(first.shingles(5)) == 2
    assert np.intersect1d(first.shingles(4), second.shingles(4)).size == 2
    assert len(Text("a b").shingles(5)) == 1
    assert len(Text("").shingles(5)) == 0


def test_classes_and_scripts() -> None:
    text = Text("Ab1, \u0431\U0001f600\U00020000")
    assert text.counts[LETTER] == 4
    assert text.counts[PUNCTUATION] == 1
    assert text.share_of(("cyrillic",)) == 0.25
    assert text.share_of(("latin", "han")) == 0.75
    assert Text("12").share_of(("latin",)) == 0.0
