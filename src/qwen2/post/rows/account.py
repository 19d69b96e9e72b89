"""An account of the rows of data that a run was given: what was left out and why, what was cut; and which rows are held out.

Left out: what is made of the others, which is a job's own (examples.py, pairs.py).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

SHOWN = 3  # rows left out for one reason that are named


@dataclass(kw_only=True)
class Account:
    """Rows that are not used, by reason, and columns that nothing was made of."""

    skipped: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)  # the first of each reason: where, and more of why
    cut: int = 0  # rows whose prompt was cut at the left
    cut_tokens: int = 0
    cut_answers: int = 0  # of these rows, not learned since they were cut themselves, or all that they answer was
    unused: Counter[str] = field(default_factory=Counter)

    def skip(self, why: str, where: str, detail: str = "") -> None:
        """Count a row that is not used."""
        self.skipped[why] += 1
        named = self.named.setdefault(why, [])
        if len(named) < SHOWN:
            named.append(f"{where}: {detail}" if detail else where)

    def losses(self, cut: str) -> list[str]:
        """For people; `cut` is what is said of those that were cut."""
        said = []
        for why, count in self.skipped.most_common():
            more = ", ..." if count > len(self.named[why]) else ""
            said.append(f"{count:,} left out: {why} ({'; '.join(self.named[why])}{more})")
        if self.cut:
            said.append(f"{self.cut:,} {cut}, {self.cut_tokens:,} tokens in all")
        if self.cut_answers:
            said.append(f"{self.cut_answers:,} answers of these are not learned: they were cut off, or all of their prompt was")
        if self.unused:
            said.append(f"columns without use: {', '.join(f'{name} ({count:,})' for name, count in sorted(self.unused.items()))}")
        return said


def is_held(ids: Sequence[int], share: float) -> bool:
    """Whether what has these ids is held out: the same in every run, and never for one of two copies alone."""
    if not share:
        return False
    digest = hashlib.blake2b(array("i", ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
