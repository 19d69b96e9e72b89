"""The first two filters: is the document in the language it should be in, and does it look like prose of that language.

The heuristics are those of web corpora (Rae et al. 2021, arXiv 2112.11446, appendix A.1; Penedo et al. 2024, arXiv 2406.17557),
with thresholds per language, measured on its texts (`norms.py`): length, letters, digits and symbols, the language's script,
lengths of words, a share of its commonest words, repeated lines and runs of words. Words are units (`units.py`): where words are
not written apart, characters or pairs of clusters.

Left out: lists of bad words, which drop what minorities write about themselves.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
from datatrove.data import Document

from qwen2.data.languages import detect
from qwen2.data.recipe import Recipe, Thresholds
from qwen2.data.steps import DETECTED, UNKNOWN, CountedFilter, analysed
from qwen2.data.units import DIGIT, LETTER, MARK, SPACE, SYMBOL, Text

SCRIPT = {  # language: its scripts, Latin where none is named
    "zh": ("han",), "ja": ("han", "kana"), "ko": ("hangul", "han"), "ru": ("cyrillic",), "ar": ("arabic",), "fa": ("arabic",),
    "ur": ("arabic",), "he": ("hebrew",), "th": ("thai",), "lo": ("lao",), "my": ("burmese",), "km": ("khmer",), "hi": ("devanagari",),
    "bn": ("bengali",),
}  # fmt: skip
# what Arabic and Hebrew may be written with and mostly are not: vowel points, signs of recitation, the stretching stroke
POINTS = re.compile("[\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u0640\u064b-\u0652\u0656-\u065f\u0670\u06d6-\u06ed]")


class LanguageFilter(CountedFilter):
    """Drops documents that are not in the language they should be in, and those in which the reader found none that is likely enough."""

    name = "language"

    def __init__(self, recipe: Recipe, counts: str) -> None:
        super().__init__(counts)
        self.recipe = recipe

    def concerns(self, document: Document) -> bool:
        """Held-out documents too where their language was detected: without one nothing can be measured on them by language."""
        return super().concerns(document) or DETECTED in document.metadata

    def look(self, document: Document) -> str | None:
        """Reasons: no language found, not the declared language."""
        code, limits = document.metadata["language"], self.recipe.limits(document.metadata["language"])
        likely = document.metadata.get(DETECTED)
        if likely is not None:
            return None if code != UNKNOWN and likely >= limits.language else "no language found"
        return None if detect(document.text).get(code, 0.0) >= limits.declared else "not the declared language"


@lru_cache(maxsize=64)
def _hashes(words: str) -> np.ndarray:
    return np.array([Text(word).units[0] for word in words.split()], np.uint64)


def common_count(text: Text, words: str) -> int:
    """How many of the units are among these words, vowel points left out."""
    bare = POINTS.sub("", text.text) if text.counts[MARK] else text.text
    units = text.units if len(bare) == len(text.text) else Text(bare).units
    return int(np.isin(units, _hashes(words)).sum())


class HeuristicFilter(CountedFilter):
    """Drops what does not look like prose of its language."""

    name = "heuristics"

    def __init__(self, recipe: Recipe, counts: str) -> None:
        super().__init__(counts)
        self.recipe = recipe

    def look(self, document: Document) -> str | None:
        """The first rule that the document breaks."""
        language = document.metadata["language"]
        return broken_rule(analysed(document), language, self.recipe.limits(language))


def in_class(text: Text, *classes: int) -> float:
    """The share of these classes in what is not space."""
    seen = sum(text.counts) - text.counts[SPACE]
    return sum(text.counts[name] for name in classes) / seen if seen else 0.0


def broken_rule(text: Text, language: str, limits: Thresholds) -> str | None:
    """The first rule that a text breaks, as words; None where it keeps all."""
    size = len(text.text.encode("utf-8", "replace"))
    if size < limits.least_bytes:
        return "too short"
    if size > limits.most_bytes:
        return "too long"
    if in_class(text, DIGIT) > limits.digits:
        return "too many digits"
    if in_class(text, SYMBOL) > limits.symbols:
        return "too many symbols"
    if in_class(text, LETTER, MARK) < limits.letters or len(text.units) == 0:
        return "too few letters"
    if text.share_of(SCRIPT.get(language, ("latin",))) < limits.script:
        return "not the language's script"
    return _broken_in_units(text, limits)


def _broken_in_units(text: Text, limits: Thresholds) -> str | None:
    lengths, units = text.lengths, text.units
    if int(lengths.max(initial=0)) > limits.longest_unit:
        return "a word too long"
    if not limits.mean_unit[0] <= float(lengths.mean()) <= limits.mean_unit[1]:
        return "words too short or too long"
    if limits.words and common_count(text, limits.words) + 1 < int(limits.stop_words * len(units)):  # one short: chance, in a short text
        return "too few common words"
    _, lines = text.line_hashes()
    if len(lines) > 1 and 1 - len(np.unique(lines)) / len(lines) > limits.repeated_lines:
        return "repeated lines"
    runs = text.shingles(limits.run)
    if len(runs) > limits.run and 1 - len(np.unique(runs)) / len(runs) > limits.repeated_runs:
        return "repeated runs of words"
    return None
