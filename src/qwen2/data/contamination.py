"""Decontamination by the Qwen2 report's rule: training text that holds an item of an evaluation set is left out.

The rule (arXiv 2407.10671): symbols and punctuation are stripped, the text is cut into tokens (our units), and a training
sequence t goes if for some evaluation sequence e their longest common subsequence has at least 13 tokens and at least 0.6 of
the shorter of the two.

Single letters and numbers of one or two digits are no tokens here: with them, numbered lists held every item with formulas.
Chinese and Japanese characters count in pairs: kana alone made 0.6 of Japanese items in texts that had nothing to do with them.
Documents are long and a subsequence may skip anything, so "sequence" is pinned down: of the evaluation text pieces of at most 64
units, of the training text all stretches of 128 units that begin at multiples of 64, so that every copy of a piece lies within
one; a shorter document is one stretch. A document goes when one of its stretches does.

Which pairs are compared is decided by counting common units, which loses none: where LCS(t, e) >= r, t holds at least r of e's
units, and of e's |e| - r + q rarest units at least q. Each piece is found through its rarest units by an inverted index, and
only for the few that pass is the subsequence computed, 64 units at a time in one integer (Allison and Dix 1986).

Left out: translations and paraphrases of items.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from qwen2.data.steps import CountedFilter, analysed
from qwen2.data.units import Hashes, Text

LEAST, SHARE = 13, 0.6  # the report's
PIECE, STRETCH = 64, 128
_AGAIN = np.uint64(0x9E3779B97F4A7C15)


def required(length: int, other: int) -> int:
    """The common subsequence that makes two sequences of these lengths one too many."""
    return max(LEAST, math.ceil(SHARE * min(length, other)))


def common(first: Hashes, second: Hashes) -> int:
    """The length of the longest common subsequence, by bit-parallel dynamic programming; cost len(first) * len(second) / 64."""
    masks: dict[int, int] = {}
    for place, unit in enumerate(second.tolist()):
        masks[unit] = masks.get(unit, 0) | 1 << place
    full = (1 << len(second)) - 1
    row = full
    for unit in first.tolist():
        if matches := row & masks.get(unit, 0):
            row = (row + matches | row - matches) & full
    return len(second) - row.bit_count()


def windows(units: Hashes, size: int, step: int) -> Iterator[tuple[int, Hashes]]:
    """Stretches of `size` that begin at multiples of `step`; the last one reaches the end."""
    for start in range(0, max(1, len(units) - size + step), step):
        yield start, units[start : start + size]


def numbered(units: Hashes) -> Hashes:
    """Units with how often each stood before mixed in: sets of these count as multisets of units do."""
    ordered = np.argsort(units, kind="stable")
    values = units[ordered]
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    first = np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))
    again = np.empty(len(values), np.uint64)
    again[ordered] = (np.arange(len(values)) - first).astype(np.uint64)
    return units + again * _AGAIN


@dataclass(frozen=True)
class Index:
    """Evaluation pieces, and where each unit stands in them.

    `rare` lists (unit, piece) of the rarest units of each piece, `every` of all units, both sorted by unit.
    """

    pieces: list[Hashes]
    names: list[str]
    rare: tuple[Hashes, Any]
    every: tuple[Hashes, Any]
    need: Any  # of the rare units of a piece, how many a stretch must have

    @classmethod
    def build(cls, items: Iterable[tuple[str, str]]) -> Index:
        """From (name, text) of items; those of fewer than 13 units can never be hit and are left out."""
        pieces: dict[bytes, tuple[Hashes, str]] = {}
        for name, text in items:
            units = Text(text).telling
            for start, piece in windows(units, PIECE, PIECE):
                whole = piece if len(piece) == PIECE or start == 0 else units[-PIECE:]
                if len(whole) >= LEAST:
                    pieces.setdefault(whole.tobytes(), (whole, name))
        return cls._of([piece for piece, _ in pieces.values()], [name for _, name in pieces.values()])

    @classmethod
    def _of(cls, pieces: list[Hashes], names: list[str]) -> Index:
        marked = [numbered(piece) for piece in pieces]
        together = np.concatenate([np.empty(0, np.uint64), *marked])
        values, counts = np.unique(together, return_counts=True)
        need, rare = [], []
        for units in marked:
            least = required(len(units), len(units))
            q = max(1, least // 2)
            rarest = np.argsort(counts[np.searchsorted(values, units)], kind="stable")[: len(units) - least + q]
            rare.append(units[rarest])
            need.append(q)
        return cls(pieces, names, _posted(rare), _posted(marked), np.array(need, np.int64))

    def save(self, path: Path) -> None:
        """Pieces and names; the rest is worked out again."""
        lengths = np.array([len(piece) for piece in self.pieces], np.int64)
        np.savez(path, units=np.concatenate([np.empty(0, np.uint64), *self.pieces]), lengths=lengths, names=np.array(self.names, str))

    @classmethod
    def load(cls, path: Path) -> Index:
        """What `save` wrote."""
        with np.load(path) as file:
            cuts = np.cumsum(file["lengths"])[:-1]
            return cls._of(np.split(file["units"], cuts) if len(file["lengths"]) else [], file["names"].tolist())

    def hit(self, text: Text) -> tuple[str, int] | None:
        """The name of an item that the text holds, and the length of what they have in common; None where it holds none."""
        values = self.every[0]
        units = text.telling
        places = np.minimum(np.searchsorted(values, units), max(0, len(values) - 1))
        known = np.append(0, np.cumsum(values[places] == units)) if len(values) else np.zeros(len(units) + 1, np.int64)
        for start, stretch in windows(units, STRETCH, PIECE):
            if known[start + len(stretch)] - known[start] < LEAST:
                continue
            for piece in self.candidates(stretch):
                length = common(stretch, self.pieces[piece])
                if length >= required(len(stretch), len(self.pieces[piece])):
                    return self.names[piece], length
        return None

    def candidates(self, stretch: Hashes) -> list[int]:
        """The pieces that the stretch may hit, none of those that it does left out."""
        if len(stretch) < LEAST or not self.pieces:
            return []
        units = numbered(stretch)
        found = _counted(units, self.rare, len(self.pieces))
        likely = np.flatnonzero(found >= self.need)
        if len(stretch) < PIECE:  # shorter than some pieces: those need only 0.6 of the stretch, wherever it stands in them
            found = _counted(units, self.every, len(self.pieces))
            likely = np.union1d(likely, np.flatnonzero(found >= required(len(stretch), PIECE)))
        return [int(piece) for piece in likely]


def _posted(units: list[Hashes]) -> tuple[Hashes, Any]:
    """(unit, piece) sorted by unit."""
    values = np.concatenate([np.empty(0, np.uint64), *units])
    owners = np.repeat(np.arange(len(units)), [len(part) for part in units])
    ordered = np.argsort(values, kind="stable")
    return values[ordered], owners[ordered]


def _counted(units: Hashes, posted: tuple[Hashes, Any], count: int) -> Any:
    """How many of the units stand in each piece."""
    values, owners = posted
    starts, ends = np.searchsorted(values, units, "left"), np.searchsorted(values, units, "right")
    runs = [owners[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True) if end > start]
    return np.bincount(np.concatenate(runs), minlength=count) if runs else np.zeros(count, np.int64)


class ContaminationFilter(CountedFilter):
    """Drops training documents that hold an evaluation item."""

    name = "contamination"

    def __init__(self, index: str, counts: str) -> None:
        super().__init__(counts)
        self.path = index

    def begin(self, rank: int) -> None:
        """Read the index."""
        self.index = Index.load(Path(self.path))

    def look(self, document: Document) -> str | None:
        """Reason: the item's source."""
        found = self.index.hit(analysed(document))
        return None if found is None else f"holds an item of {found[0].partition(':')[0]}"
