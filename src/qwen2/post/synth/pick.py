"""Which answers of a prompt become rows: short ones that differ, and pairs of a right and a wrong one.

Right answers: the shortest first, then again and again the one that differs most from those taken (of equal ones the shorter, then the
earlier). Answers that differ by white space or case only are one. The distance of two texts is that of their sets of four characters
(1 - intersection / union), which knows no words and so is alike in every language.

Pairs: the first right answer that was taken with the wrong one nearest to it in length, so that length teaches nothing; the second
with the nearest of those left, and so on. Rule "frequent" takes a wrong answer with the result that was given most often, what the
model believes; of several the nearest in length. An answer that was cut off, or whose checker failed, is in no pair.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

GRAM = 4  # characters
Order = Literal["spread", "shortest"]
Rule = Literal["length", "frequent"]


@dataclass(frozen=True)
class Candidate:
    """An answer as it is chosen: its sample's index, its text, its length in tokens, and what the checker read from it."""

    index: int
    text: str
    tokens: int
    said: str = ""


def pick(right: Sequence[Candidate], most: int, order: Order = "spread", least_distance: float = 0.0) -> list[Candidate]:
    """At most `most` right answers, none nearer to another than `least_distance`."""
    left = _different(right)
    taken: list[Candidate] = []
    while left and len(taken) < most:
        if order == "shortest" or not taken:
            best = left[0]
        else:
            best = max(left, key=lambda one: (nearest(one, taken), -one.tokens, -one.index))
        left.remove(best)
        if not taken or nearest(best, taken) >= least_distance:
            taken.append(best)
    return taken


def pairs(taken: Sequence[Candidate], wrong: Sequence[Candidate], most: int, rule: Rule = "length") -> list[tuple[Candidate, Candidate]]:
    """At most `most` pairs (right, wrong), every answer in one at most."""
    left, found = _different(wrong), list[tuple[Candidate, Candidate]]()
    often = Counter(one.said for one in wrong)
    for right in taken[:most]:
        if not left:
            break
        worst = min(left, key=lambda one: (-often[one.said] if rule == "frequent" else 0, abs(one.tokens - right.tokens), one.index))
        left.remove(worst)
        found.append((right, worst))
    return found


def nearest(one: Candidate, others: Sequence[Candidate]) -> float:
    """The distance to the nearest of the others."""
    return min(distance(one.text, other.text) for other in others)


def distance(first: str, second: str) -> float:
    """From 0, the same sets of four characters, to 1, none in common."""
    a, b = _grams(first), _grams(second)
    return 1 - len(a & b) / max(len(a | b), 1)


def _grams(text: str) -> set[str]:
    text = plain(text)
    return {text[i : i + GRAM] for i in range(max(1, len(text) - GRAM + 1))}


def plain(text: str) -> str:
    """The text without what makes no difference: case, and how much white space."""
    return re.sub(r"\s+", " ", text).strip().lower()


def _different(answers: Sequence[Candidate]) -> list[Candidate]:
    """The shortest first, none twice."""
    first: dict[str, Candidate] = {}
    for answer in sorted(answers, key=lambda one: (one.tokens, one.index)):
        first.setdefault(plain(answer.text), answer)
    return list(first.values())
