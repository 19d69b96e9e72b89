"""Decontamination by the Qwen2 report's rule: training text that holds an item of an evaluation set is left out.

The rule (arXiv 2407.10671): symbols and punctuation are stripped, the text is cut into tokens (our units), and a training
sequence t goes if for some evaluation sequence e their longest common subsequence has at least 13 tokens and at least 0.6 of
the shorter of the two.

Single letters and numbers of one or two digits are no tokens at first: with them, numbered lists held every item with formulas.
Chinese and Japanese characters count in pairs: kana alone made 0.6 of Japanese items in texts that had nothing to do with them.
Documents are long and a subsequence may skip anything, so "sequence" is pinned down: of the evaluation text pieces of at most 64
such telling units, of the training text all stretches of 128 that begin at multiples of 64, so that every copy of a piece lies
within one; a shorter document is one stretch. A document goes when one of its stretches does.

Which pairs are compared is decided by counting common units, which loses none: where LCS(t, e) >= r, t holds at least r of e's
units, and of e's |e| - r + q rarest units at least q. Each piece is found through its rarest units by an inverted index, and
only for the few that pass is the subsequence computed, 64 units at a time in one integer (Allison and Dix 1986).

Formulas, short programs and short items in Chinese or Japanese have at least 13 units, and fewer than 13 telling ones. They are
compared by all units and the same rule, but with what lies close together (`Terse`): where document and piece share a run of 4
units, the stretch is 1.3 times as long as the piece and laid so that the runs meet. It must hold 0.6 of the piece's telling units
in order too, and all units of a piece that has none that tell. Copies of every item of at least 13 units are found by one of the
two; what is shorter is counted, and said in the report.

Left out: translations and paraphrases of items.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from qwen2.data.steps import CountedFilter, analysed
from qwen2.data.units import Hashes, Text, runs

LEAST, SHARE = 13, 0.6  # the report's
PIECE, STRETCH = 64, 128
RUN, SPARE = 4, 0.15  # of a terse piece: units that begin a comparison, and how much longer a stretch is at each end
_AGAIN = np.uint64(0x9E3779B97F4A7C15)


def required(length: int, other: int) -> int:
    """The common subsequence that makes two sequences of these lengths one too many."""
    return max(LEAST, math.ceil(SHARE * min(length, other)))


def too_short(item: Text) -> bool:
    """Whether an item has fewer units than the rule asks for, so that nothing is compared with it."""
    return len(item.units) < LEAST


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


def cut(units: Hashes) -> Iterator[tuple[int, int]]:
    """From where to where the pieces of an item go: all of PIECE units, unless the item is shorter."""
    for start in range(0, max(1, len(units)), PIECE):
        end = min(start + PIECE, len(units))
        yield max(0, min(start, end - PIECE)), end


@dataclass(frozen=True)
class Terse:
    """Pieces of items with few telling units: for each all its units, those that tell, and an item's name."""

    pieces: list[tuple[Hashes, Hashes]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @cached_property
    def posted(self) -> tuple[Hashes, Any, Any]:
        """Each run of RUN units, its piece and its place there, sorted by run."""
        parts = [runs(units, RUN) for units, _ in self.pieces]
        places = [np.arange(len(part)) for part in parts]
        values, owners = _posted(parts)
        ordered = np.argsort(np.concatenate([np.empty(0, np.uint64), *parts]), kind="stable")
        return values, owners, np.concatenate([np.empty(0, np.intp), *places])[ordered]

    def hit(self, text: Text) -> tuple[str, int] | None:
        """As `Index.hit`."""
        values, owners, places = self.posted
        units = text.units
        if len(units) < LEAST or not self.pieces:
            return None
        met = runs(units, RUN)
        first = np.searchsorted(values, met)
        known = np.flatnonzero(values[np.minimum(first, len(values) - 1)] == met)
        compared = set()
        for place, start, end in zip(known, first[known], np.searchsorted(values, met[known], "right"), strict=True):
            for piece, begin in zip(owners[start:end].tolist(), (place - places[start:end]).tolist(), strict=True):
                if (piece, begin) not in compared:
                    compared.add((piece, begin))
                    if length := self._length(text, piece, begin):
                        return self.names[piece], length
        return None

    def _length(self, text: Text, piece: int, begin: int) -> int:
        """What the piece has in common with the text about the place where it would begin; 0 where that is too little."""
        units, telling = self.pieces[piece]
        spare = math.ceil(SPARE * len(units))
        start, end = max(0, begin - spare), min(len(text.units), begin + len(units) + spare)
        length = common(text.units[start:end], units)
        if length < (required(end - start, len(units)) if len(telling) else len(units)):
            return 0
        wanted = math.ceil(SHARE * len(telling) * min(1, (end - start) / len(units)))
        return length if common(text.telling_within(start, end), telling) >= wanted else 0


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
    terse: Terse

    @classmethod
    def build(cls, items: Iterable[tuple[str, str]]) -> Index:
        """From (name, text) of items; those of fewer than 13 units can never be hit and are left out (`too_short`)."""
        pieces: dict[bytes, tuple[Hashes, str]] = {}
        terse: dict[bytes, tuple[tuple[Hashes, Hashes], str]] = {}
        for name, item in items:
            text = Text(item)
            if len(text.telling) >= LEAST:
                for start, end in cut(text.telling):
                    piece = text.telling[start:end]
                    pieces.setdefault(piece.tobytes(), (piece, name))
            elif not too_short(text):
                for start, end in cut(text.units):
                    piece = text.units[start:end]
                    terse.setdefault(piece.tobytes(), ((piece, text.telling_within(start, end)), name))
        beside = Terse([piece for piece, _ in terse.values()], [name for _, name in terse.values()])
        return cls._of([piece for piece, _ in pieces.values()], [name for _, name in pieces.values()], beside)

    @classmethod
    def _of(cls, pieces: list[Hashes], names: list[str], terse: Terse) -> Index:
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
        return cls(pieces, names, _posted(rare), _posted(marked), np.array(need, np.int64), terse)

    def save(self, path: Path) -> None:
        """Pieces and names; the rest is worked out again."""
        parts = {"pieces": self.pieces, "units": [units for units, _ in self.terse.pieces], "telling": [t for _, t in self.terse.pieces]}
        joined: dict[str, Any] = {name: np.concatenate([np.empty(0, np.uint64), *part]) for name, part in parts.items()}
        lengths: dict[str, Any] = {f"{name}_lengths": np.array([len(units) for units in part], np.int64) for name, part in parts.items()}
        np.savez(path, **joined, **lengths, names=np.array(self.names, str), terse_names=np.array(self.terse.names, str))

    @classmethod
    def load(cls, path: Path) -> Index:
        """What `save` wrote."""
        with np.load(path) as file:
            pieces, units, telling = (
                np.split(file[name], np.cumsum(file[f"{name}_lengths"])[:-1]) if len(file[f"{name}_lengths"]) else []
                for name in ("pieces", "units", "telling")
            )
            terse = Terse(list(zip(units, telling, strict=True)), file["terse_names"].tolist())
            return cls._of(pieces, file["names"].tolist(), terse)

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
        return self.terse.hit(text)

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
