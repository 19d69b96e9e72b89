"""The first two filters: is the document in the language it should be in, and does it look like prose of that language.

The heuristics are those of web corpora (Rae et al. 2021, arXiv 2112.11446, appendix A.1; Penedo et al. 2024, arXiv 2406.17557),
with thresholds per language: length, letters, digits and symbols, lengths of words, repeated lines and runs of words, the
language's script, and, for languages in Latin letters that are easily taken for each other, a share of their commonest words.

Left out: lists of bad words, which drop what minorities write about themselves.
"""

from __future__ import annotations

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
JOINED = {"zh", "ja", "th", "lo", "my", "km"}  # words are not written apart: units are no words
STOP_WORDS = {  # common words; those of their languages that ASCII can write
    "en": "the and of to in is that for with are this be on by or you",
    "de": "der die das und ist nicht mit ein eine von auf den dem zu im in",
    "fr": "le la les de des et est une un dans pour que du au sur ou",
    "es": "el la los las de que en una un por para con del se es y",
    "pt": "o a os as de que em uma um por para com do da se e no na",
    "it": "il la di che un una per con del della non in si le e",
    "nl": "de het een van en is dat niet op te in voor met zijn om",
    "cs": "a v na se je to z do pro o jako by ve nebo aby",
    "pl": "w i na z do nie jest to o za lub przez dla od po",
    "tr": "ve bir bu ile olarak da de daha ya olan veya her ne",
    "vi": "trong cho khi theo hay trang sau hai qua tin xem cao thay sang ra",
    "id": "yang dan di untuk dengan ini dari pada tidak atau ke dalam adalah",
    "ms": "yang dan di untuk dengan ini dari pada tidak atau ke dalam adalah anda ialah",
    "ceb": "ang sa nga ug mga kay og dili ni kon usa",
    "tl": "ang ng sa na mga ay at para hindi ito kung o isang",
}


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
def _stop_hashes(language: str) -> np.ndarray:
    return np.unique(Text(STOP_WORDS[language]).units)


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


def broken_rule(text: Text, language: str, limits: Thresholds) -> str | None:
    """The first rule that a text breaks, as words; None where it keeps all."""
    size = len(text.text.encode("utf-8", "replace"))
    if size < limits.least_bytes:
        return "too short"
    if size > limits.most_bytes:
        return "too long"
    counts = text.counts
    seen = sum(counts) - counts[SPACE]
    if seen == 0 or (counts[LETTER] + counts[MARK]) / seen < limits.letters:
        return "too few letters"
    if counts[DIGIT] / seen > limits.digits:
        return "too many digits"
    if counts[SYMBOL] / seen > limits.symbols:
        return "too many symbols"
    if text.share_of(SCRIPT.get(language, ("latin",))) < limits.script:
        return "not the language's script"
    return _broken_in_units(text, language, limits)


def _broken_in_units(text: Text, language: str, limits: Thresholds) -> str | None:
    lengths, units = text.lengths, text.units
    if int(lengths.max(initial=0)) > limits.longest_unit:
        return "a word too long"
    if language not in JOINED and not limits.mean_unit[0] <= float(lengths.mean()) <= limits.mean_unit[1]:
        return "words too short or too long"
    if language in STOP_WORDS and float(np.isin(units, _stop_hashes(language)).mean()) < limits.stop_words:
        return "too few common words"
    _, lines = text.line_hashes()
    if len(lines) > 1 and 1 - len(np.unique(lines)) / len(lines) > limits.repeated_lines:
        return "repeated lines"
    runs = text.shingles(5)
    if len(runs) > 5 and 1 - len(np.unique(runs)) / len(runs) > limits.repeated_runs:
        return "repeated runs of words"
    return None
