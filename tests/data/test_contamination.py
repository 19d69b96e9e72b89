"""Decontamination: the fast search agrees with the plain rule on every pair, and no piece is lost before it is compared."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.data.contamination import LEAST, PIECE, STRETCH, Index, common, numbered, required, windows
from qwen2.data.units import Text


def lcs(first: list[int], second: list[int]) -> int:
    """The longest common subsequence by the textbook's table."""
    row = [0] * (len(second) + 1)
    for a in first:
        last = row[:]
        for j, b in enumerate(second):
            row[j + 1] = last[j] + 1 if a == b else max(last[j + 1], row[j])
    return row[-1]


def ids(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint64)


@given(st.lists(st.integers(0, 6), max_size=80), st.lists(st.integers(0, 6), max_size=80))
def test_the_subsequence_is_the_textbook_s(first: list[int], second: list[int]) -> None:
    assert common(ids(first), ids(second)) == lcs(first, second)


@given(st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 4), max_size=30))
def test_numbered_units_count_as_multisets(first: list[int], second: list[int]) -> None:
    shared = sum(min(first.count(value), second.count(value)) for value in range(5))
    assert len(np.intersect1d(numbered(ids(first)), numbered(ids(second)))) == shared


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 400))
def test_no_pair_is_lost(seed: int, alphabet: int) -> None:
    """Against comparing every stretch with every piece: random pieces, and stretches made of them with changes."""
    draw = random.Random(seed)
    items = [[draw.randrange(alphabet) for _ in range(draw.randint(5, 90))] for _ in range(12)]
    index = Index.build((str(n), " ".join(f"w{value}" for value in item)) for n, item in enumerate(items))
    base = items[draw.randrange(len(items))]
    words = [value for value in base if draw.random() < draw.choice([0.5, 0.65, 0.8, 1.0])]
    for _ in range(draw.randint(0, 60)):
        words.insert(draw.randint(0, len(words)), draw.randrange(alphabet))
    units = Text(" ".join(f"w{value}" for value in words)).units
    for _, stretch in windows(units, STRETCH, PIECE):
        true = [
            place for place, piece in enumerate(index.pieces) if lcs(stretch.tolist(), piece.tolist()) >= required(len(stretch), len(piece))
        ]
        assert set(true) <= set(index.candidates(stretch))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 191, 192, 193, 500])
def test_every_copy_lies_within_a_stretch(length: int) -> None:
    units = np.arange(length, dtype=np.uint64)
    stretches = [(start, start + len(part)) for start, part in windows(units, STRETCH, PIECE)]
    for start in range(max(1, length - PIECE + 1)):
        end = min(start + PIECE, length)
        assert any(first <= start and end <= last for first, last in stretches)


@pytest.fixture(scope="module")
def index(articles: dict[str, list[str]]) -> Index:
    return Index.build((f"udhr:{code}", paragraph) for code, paragraphs in articles.items() for paragraph in paragraphs)


def test_copies_are_found_in_every_language(articles: dict[str, list[str]], index: Index) -> None:
    filler = {code: "\n".join(f"{n} {paragraphs[0][:20]}" for n in range(8)) for code, paragraphs in articles.items()}
    for code, paragraphs in articles.items():
        longest = max(paragraphs, key=lambda paragraph: len(Text(paragraph).units))
        for text in (longest, longest.upper(), longest.replace(",", " -"), f"{filler[code]}\n{longest}\n{filler[code]}"):
            assert index.hit(Text(text)) is not None, (code, text)


def test_a_cut_and_changed_copy_is_found_up_to_the_threshold(index: Index, articles: dict[str, list[str]]) -> None:
    words = max(articles["en"], key=len).split()[:40]
    changed = [word if n % 3 else f"new{n}" for n, word in enumerate(words)]  # two thirds stay
    name, length = index.hit(Text(" ".join(changed))) or ("", 0)
    assert name == "udhr:en"
    assert 20 <= length <= sum(1 for n in range(40) if n % 3)
    lost = [word if n % 2 else f"new{n}" for n, word in enumerate(words)]  # half stays: below 0.6
    assert index.hit(Text(" ".join(lost))) is None


def test_lists_of_numbers_are_no_items() -> None:
    numbers = " ".join(map(str, range(1, 90)))
    assert Index.build([("x", numbers)]).hit(Text("\n".join(f"{n}. of the list" for n in range(1, 90)))) is None
    formulas = Index.build([("x", f"Find the least n for which a b c {numbers} and so on for all x of them below this line here")])
    assert formulas.hit(Text(f"Table of contents {numbers}")) is None


def test_common_kana_are_no_item() -> None:
    """A question and a help text of Japanese: most of their kana agree in order, and none of what they say."""
    item = "\u6b21\u306e\u65b9\u7a0b\u5f0f\u3092\u89e3\u304d\u3001\u305d\u306e\u89e3\u306e\u5408\u8a08\u3092\u6c42\u3081\u308b\u3053\u3068\u304c\u3067\u304d\u308b\u3068\u3057\u307e\u3059"
    index = Index.build([("maths", item)])
    other = "\u3053\u306e\u753b\u9762\u3092\u958b\u304d\u3001\u305d\u306e\u4e0a\u306e\u30dc\u30bf\u30f3\u3092\u62bc\u3057\u3066\u9078\u3081\u308b\u3053\u3068\u304c\u3067\u304d\u308b\u3068\u3057\u307e\u3059"
    assert lcs(Text(item).units.tolist(), Text(other).units.tolist()) >= LEAST  # character by character it would be one
    assert index.hit(Text(other)) is None
    assert index.hit(Text(f"{other}\n{item}")) == ("maths", len(Text(item).telling))
    assert index.hit(Text(item[:8] + "\u3042" + item[9:])) is not None


def test_false_hits_are_none(index: Index, articles: dict[str, list[str]]) -> None:
    other = [
        "The weather of the coast is mild in winter and dry in the summer, and the rain that falls in autumn is soon gone from it.",
        "Click the button on the left of the window to open the list, and choose the item that you want to have printed on all pages.",
    ]
    assert [text for text in other if index.hit(Text(text))] == []
    assert [code for code in ("de", "ja", "th") if index.hit(Text(articles[code][0][:12]))] == []  # shorter than 13 tokens


def test_short_items_are_left_out_and_an_index_is_read_again(tmp_path: Path, index: Index, articles: dict[str, list[str]]) -> None:
    short = Index.build([("x", "one two three")])
    assert (short.pieces, short.terse.pieces) == ([], [])
    assert Index.build([]).hit(Text("one two three " * 10)) is None
    assert all(len(piece) >= LEAST for piece in index.pieces)
    index.save(tmp_path / "index.npz")
    again = Index.load(tmp_path / "index.npz")
    text = Text("\n".join(articles["fr"]))
    assert again.hit(text) == index.hit(text) is not None
    Index.build([]).save(tmp_path / "empty.npz")
    assert Index.load(tmp_path / "empty.npz").hit(text) is None
