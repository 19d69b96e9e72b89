"""Which examples share a row: planned epoch by epoch from the seed and the examples' lengths alone.

An epoch is every example once, in an order drawn from the seed and the epoch's number; of examples that are spread over several epochs
it is another part each time. Some thousand examples at a time are laid into
rows, the longest first, each into the row that it leaves the least room in; then the rows are shuffled. Without packing a row is one
example. The state of the stream is the epoch and the row, so that a run goes on exactly where it was.

What is left out: examples longer than a row (encode.py refuses or cuts them), and padding, which ragged batches do not have.

    rows = PackedRows(lengths, length=1024, packing=True, seed=0)
    next(rows)                                              # indices of the examples of the next row
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

WINDOW = 4096  # examples that are laid into rows together


class PackedRows(Iterator[list[int]]):
    """Rows without end; `taken` of them were given. Of the examples `spread` an epoch has one in `parts`, the next one's are others."""

    def __init__(self, lengths: np.ndarray, length: int, packing: bool, seed: int, spread: Sequence[int] = (), parts: int = 1) -> None:
        if not len(lengths):
            raise ValueError("there are no examples to make rows of")
        if int(lengths.max()) > length:
            raise ValueError(f"an example of {int(lengths.max()):,} tokens does not fit into a row of {length:,}")
        self.lengths, self.length, self.packing, self.seed = lengths, length, packing, seed
        self.parts, self.turns = parts, np.full(len(lengths), -1)
        self.turns[np.array(spread, dtype=np.int64)] = np.arange(len(spread)) % parts
        if len(spread) == len(lengths) < parts:
            raise ValueError(f"epochs would be empty: {len(spread):,} texts spread over {parts:,} epochs, and nothing else")
        self.epoch, self.at, self.taken = 0, 0, 0
        self.rows = self.plan(0)

    def __next__(self) -> list[int]:
        if self.at == len(self.rows):
            self.epoch, self.at = self.epoch + 1, 0
            self.rows = self.plan(self.epoch)
        self.at += 1
        self.taken += 1
        return self.rows[self.at - 1]

    def plan(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, in their order."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        if self.parts > 1:
            order = order[self.present(epoch)[order]]
        if not self.packing:
            return [[int(index)] for index in order]
        rows = [row for start in range(0, len(order), WINDOW) for row in self._fill(order[start : start + WINDOW])]
        return [rows[index] for index in rng.permutation(len(rows))]

    def present(self, epoch: int) -> np.ndarray:
        """Which of the examples an epoch has."""
        return (self.turns < 0) | (self.turns == epoch % self.parts)

    def _fill(self, examples: np.ndarray) -> list[list[int]]:
        rows: list[list[int]] = []
        room: list[tuple[int, int]] = []  # of each row that has any: how much, and which row
        for index in sorted(map(int, examples), key=lambda index: -int(self.lengths[index])):  # stable: ties stay as they were drawn
            size = int(self.lengths[index])
            place = bisect_left(room, (size, -1))
            if place == len(room):
                left, row = self.length, len(rows)
                rows.append([])
            else:
                left, row = room.pop(place)
            rows[row].append(index)
            if left > size:
                insort(room, (left - size, row))
        return rows

    def total(self, epochs: float) -> int:
        """Rows of so many epochs, at least one."""
        whole = int(epochs)
        count = sum(len(self.plan(epoch)) if self.packing else int(self.present(epoch).sum()) for epoch in range(whole))
        rest = epochs - whole
        return max(1, count + (round(rest * len(self.plan(whole))) if rest else 0))

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON can hold it."""
        return {"epoch": self.epoch, "row": self.at, "taken": self.taken}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. ValueError where it is of other examples."""
        self.epoch, self.at, self.taken = int(state["epoch"]), int(state["row"]), int(state["taken"])
        self.rows = self.plan(self.epoch)
        if self.at > len(self.rows):
            raise ValueError(f"the data position is row {self.at:,} of an epoch of {len(self.rows):,}: other examples")
