"""Text as units that every step of the pipeline shares: words, or characters where words are not written apart.

A unit is a run of letters, marks and digits, folded (NFKC, lower case); a Chinese character or a Japanese kana alone; and in
Thai, Lao, Burmese and Khmer each pair of neighbouring syllable clusters, since single ones are too few to tell texts apart.
Punctuation and symbols separate units and are dropped. Units are 64-bit hashes, computed for a whole text at once in numpy.

Left out: dictionaries of words.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
LETTER, MARK, DIGIT, PUNCTUATION, SYMBOL, SPACE, CONTROL = range(7)
_CATEGORY = {"L": LETTER, "M": MARK, "N": DIGIT, "P": PUNCTUATION, "S": SYMBOL, "Z": SPACE, "C": CONTROL}
PLANE = 2**16  # beyond it: ideographs from 0x20000 on are letters, the rest symbols
SCRIPTS = {  # name: ranges of code points
    "latin": [(0x41, 0x24F), (0x1E00, 0x1EFF)],
    "cyrillic": [(0x400, 0x52F)],
    "hebrew": [(0x590, 0x5FF)],
    "arabic": [(0x600, 0x6FF), (0x750, 0x77F), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)],
    "devanagari": [(0x900, 0x97F)],
    "bengali": [(0x980, 0x9FF)],
    "thai": [(0xE00, 0xE7F)],
    "lao": [(0xE80, 0xEFF)],
    "burmese": [(0x1000, 0x109F)],
    "hangul": [(0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)],
    "khmer": [(0x1780, 0x17FF)],
    "kana": [(0x3040, 0x30FF)],
    "han": [(0x3400, 0x9FFF), (0xF900, 0xFAFF)],
}
_NAMES = ["", *SCRIPTS]
_WHOLE = np.array([name in ("han", "kana") for name in _NAMES])
_CLUSTERED = np.array([name in ("thai", "lao", "burmese", "khmer") for name in _NAMES])
_K1, _K2, _K3 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


@lru_cache(maxsize=1)
def _tables() -> tuple[Any, Any]:
    """For each code point of the first plane: its class and its script."""
    classes = np.array([_CATEGORY[unicodedata.category(chr(c))[0]] for c in range(PLANE)], np.uint8)
    classes[[9, 10, 13]] = SPACE
    scripts = np.zeros(PLANE, np.uint8)
    for number, ranges in enumerate(SCRIPTS.values(), start=1):
        for first, last in ranges:
            scripts[first : last + 1] = number
    return classes, scripts


def mixed(values: Any) -> Hashes:
    """Each 64-bit value spread over all bits (the finaliser of splitmix64, Steele et al. 2014)."""
    values = values + _K1
    values = (values ^ (values >> _S30)) * _K2
    values = (values ^ (values >> _S27)) * _K3
    return values ^ (values >> _S31)


def folded(text: str) -> str:
    """The text in the form in which units are compared."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


@dataclass
class Text:
    """One text, analysed as far as somebody asks."""

    text: str
    _distinct: dict[int, Hashes] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def codes(self) -> Any:
        """Code points of the folded text."""
        return np.frombuffer(folded(self.text).encode("utf-32-le", "replace"), np.uint32)

    @cached_property
    def classes(self) -> Any:
        """The class of each code point: LETTER, MARK, ..."""
        low = _tables()[0][np.minimum(self.codes, PLANE - 1)]
        return low if len(self.codes) == 0 or self.codes.max() < PLANE else np.where(self.codes < PLANE, low, _high(self.codes))

    @cached_property
    def scripts(self) -> Any:
        """The number of each code point's script, 0 for none of SCRIPTS."""
        low = _tables()[1][np.minimum(self.codes, PLANE - 1)]
        return np.where(self.codes >= 0x20000, np.uint8(_NAMES.index("han")), low)

    @cached_property
    def counts(self) -> list[int]:
        """How many code points there are of each class."""
        return list(map(int, np.bincount(self.classes, minlength=7)))

    def share_of(self, scripts: tuple[str, ...]) -> float:
        """The share of the letters and marks that are of these scripts; 0 for a text without letters."""
        letters = self.scripts[self.classes <= MARK]
        wanted = np.array([name in scripts for name in _NAMES])
        return float(wanted[letters].mean()) if len(letters) else 0.0

    @cached_property
    def _found(self) -> tuple[Hashes, Any, Any]:
        """The units, for each the place of its first code point, and its length in code points."""
        if len(self.codes) == 0:
            return np.empty(0, np.uint64), np.empty(0, np.intp), np.empty(0, np.intp)
        wordy = self.classes <= DIGIT
        whole = _WHOLE[self.scripts] & (self.classes != MARK)
        clustered = _CLUSTERED[self.scripts]
        starts = whole | (clustered & (self.classes != MARK))
        starts[1:] |= ~wordy[:-1] | whole[:-1] & (self.classes[1:] != MARK) | (clustered[1:] != clustered[:-1])
        starts[0] = True
        places = np.flatnonzero(starts & wordy)
        if len(places) == 0:
            return np.empty(0, np.uint64), places, places
        first = np.zeros(len(self.codes), np.intp)
        first[places] = places
        within = np.arange(len(self.codes)) - np.maximum.accumulate(first)  # the place of each code point in its unit
        parts = mixed(self.codes.astype(np.uint64) + (within.astype(np.uint64) << np.uint64(32)))
        units = np.add.reduceat(np.where(wordy, parts, np.uint64(0)), places)
        lengths = np.add.reduceat(wordy, places, dtype=np.intp)
        joined = clustered[places[:-1]] & clustered[places[1:]] & (places[:-1] + lengths[:-1] == places[1:])
        units[:-1] = np.where(joined, units[:-1] * _K2 + units[1:], units[:-1])
        return units, places, lengths

    @property
    def units(self) -> Hashes:
        """The units in order, as hashes."""
        return self._found[0]

    @cached_property
    def _telling(self) -> tuple[Hashes, Any]:
        """The telling units, and the number of the unit in which each begins."""
        units, places, lengths = self._found
        weak = (lengths <= 2) & (self.classes[places] == DIGIT) | (lengths == 1) & (self.scripts[places] == _NAMES.index("latin"))
        whole = _WHOLE[self.scripts[places]]
        if whole.any():
            paired = np.append(whole[:-1] & whole[1:] & (places[:-1] + lengths[:-1] == places[1:]), False)
            units = np.where(paired, units * _K2 + np.append(units[1:], np.uint64(0)), units)
            weak |= whole & ~paired
        return units[~weak], np.flatnonzero(~weak)

    @property
    def telling(self) -> Hashes:
        """The units without single Latin letters and numbers of one or two digits, which lists and formulas are full of.

        Of Chinese and Japanese each pair of neighbouring characters: all texts share the commonest kana.
        """
        return self._telling[0]

    def telling_within(self, start: int, end: int) -> Hashes:
        """Those that begin in the units from `start` to before `end`."""
        telling, numbers = self._telling
        first, last = np.searchsorted(numbers, (start, end))
        return telling[first:last]

    @property
    def lengths(self) -> Any:
        """The length of each unit in code points."""
        return self._found[2]

    def spelled(self, number: int) -> str:
        """A unit as text, with its neighbour where a unit is a pair of clusters. A text of it alone begins with the same unit."""
        _, places, lengths = self._found
        start, end = places[number], places[number] + lengths[number]
        if number + 1 < len(places) and places[number + 1] == end and _CLUSTERED[self.scripts[[start, end]]].all():
            end += lengths[number + 1]
        return str(self.codes[start:end].tobytes().decode("utf-32-le"))

    @cached_property
    def line_of_unit(self) -> Any:
        """The number of the line in which each unit begins."""
        newlines = np.flatnonzero(self.codes == 10)
        return np.searchsorted(newlines, self._found[1])

    def line_hashes(self) -> tuple[Any, Hashes]:
        """The lines that have units, and the hash of each one's units in order."""
        if len(self.units) == 0:
            return np.empty(0, np.intp), self.units
        lines, starts = np.unique(self.line_of_unit, return_index=True)
        place = np.arange(len(self.units)) - np.repeat(starts, np.diff(np.append(starts, len(self.units))))
        return lines, np.add.reduceat(mixed(self.units + (place.astype(np.uint64) * _K3)), starts)

    def shingles(self, n: int) -> Hashes:
        """The hashes of all runs of n units; of all units together where there are fewer."""
        return runs(self.units, n)

    def distinct_shingles(self, n: int) -> Hashes:
        """Each of `shingles` once, sorted; worked out once for all steps."""
        if n not in self._distinct:
            self._distinct[n] = np.unique(self.shingles(n))
        return self._distinct[n]

    def whole_hash(self) -> int:
        """The hash of all units in order: alike for texts that differ in case, punctuation and spacing only."""
        place = np.arange(len(self.units), dtype=np.uint64) * _K3
        return int(mixed(self.units + place).sum(dtype=np.uint64))


def runs(units: Hashes, n: int) -> Hashes:
    """The hashes of all runs of n units; of all units together where there are fewer."""
    n = min(n, len(units))
    if n == 0:
        return units
    run = np.zeros(len(units) - n + 1, np.uint64)
    for i in range(n):
        run = run * _K2 + units[i : i + len(run)]
    return mixed(run)


def _high(codes: Any) -> Any:
    return np.where(codes >= 0x20000, np.uint8(LETTER), np.uint8(SYMBOL))
