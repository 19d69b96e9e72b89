"""Short arithmetic whose answers are known, asked plainly and as stories in 25 languages (arithmetic.json).

Training and held-out problems are disjoint by construction: a fact such as 5 + 7 = 12 belongs to one of the two by its hash alone, and
with it all that follows from it (7 + 5, 12 - 7, 12 - 5), in every language, as numbers or as a story, for every seed, count and range.
Products are alike (3 x 4, 12 / 4). Left out: several steps, negative numbers, remainders, numbers in words.

    problems(1000, "train", seed=0)[0].prompt       # "What is 57 + 4?"
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

Split = Literal["train", "held-out"]
Operation = Literal["add", "sub", "mul", "div"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
SIGNS = {"add": "+", "sub": "-", "mul": "\u00d7", "div": "\u00f7"}
TEXTS = Path(__file__).with_name("arithmetic.json")
HELD_OUT = 0.2  # of all facts
TRIES = 200  # in a row that find nothing new


@lru_cache(maxsize=1)
def texts() -> dict[str, dict[str, Any]]:
    """How each language asks and answers."""
    loaded: dict[str, dict[str, Any]] = json.loads(TEXTS.read_text(encoding="utf-8"))
    return loaded


@dataclass(frozen=True)
class Problem:
    """One problem: `expression` is it in signs, `said` the answer in its language."""

    prompt: str
    answer: int
    language: str
    operation: Operation
    story: bool
    expression: str
    said: str

    @property
    def source(self) -> str:
        """What acceptance is counted by: the operation, and whether it is told as a story."""
        return f"{self.operation} story" if self.story else self.operation

    def row(self) -> dict[str, Any]:
        """A prompt whose answer is checked."""
        return {"prompt": self.prompt, "answer": self.answer, "language": self.language, "source": self.source}

    def solved(self, worked: bool = False) -> dict[str, Any]:
        """A conversation to learn from; `worked` puts the sum in signs before the answer."""
        answer = f"{self.expression} = {self.answer}. {self.said}" if worked else self.said
        turns = [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": answer}]
        return {"messages": turns, "provenance": {"source": f"arithmetic {self.source}", "language": self.language, "answer": self.answer}}


@dataclass(frozen=True)
class Kind:
    """Which problems: operations, the largest summand and factor, the languages, the share of stories. ValueError for what has none."""

    operations: Sequence[Operation] = OPERATIONS
    largest: int = 99
    largest_factor: int = 12
    languages: Sequence[str] = ()  # empty: all
    stories: float = 0.5

    def __post_init__(self) -> None:
        for name, given, known in (("operation", self.operations, OPERATIONS), ("language", self.languages, tuple(texts()))):
            if unknown := [one for one in given if one not in known]:
                raise ValueError(f"{name} {unknown[0]!r}: unknown; there are {', '.join(known)}")
        if not self.operations:
            raise ValueError(f"no operation: name some of {', '.join(OPERATIONS)}")
        for name in ("largest", "largest_factor"):
            if not 2 <= getattr(self, name) <= 10**9:
                raise ValueError(f"{name} {getattr(self, name)}: must be from 2 to 1,000,000,000")
        if not 0 <= self.stories <= 1:
            raise ValueError(f"stories {self.stories:g}: must be a share, from 0 to 1")


ALL = Kind()


def problems(count: int, split: Split, seed: int = 0, kind: Kind = ALL) -> list[Problem]:
    """So many different problems of a split, languages in turn; the same for a seed. ValueError where there are not so many."""
    draw = random.Random(f"arithmetic {split} {seed}")
    languages, found, failed = list(kind.languages or texts()), dict[str, Problem](), 0
    while len(found) < count:
        problem = _problem(draw, split, languages[len(found) % len(languages)], kind)
        if problem is None or problem.prompt in found:
            failed += 1
        else:
            found[problem.prompt], failed = problem, 0
        if failed > TRIES:
            raise ValueError(f"only {len(found):,} of {count:,} {split} problems found that differ; allow larger numbers, or ask for fewer")
    return list(found.values())


def _problem(draw: random.Random, split: Split, language: str, kind: Kind) -> Problem | None:
    """A problem by chance; None where its fact is the other split's."""
    operation = draw.choice(list(kind.operations))
    largest = kind.largest if operation in ("add", "sub") else kind.largest_factor
    first, second = draw.randint(1, largest), draw.randint(1, largest)
    if split_of(operation, first, second) != split:
        return None
    whole = first + second if operation in ("add", "sub") else first * second
    a, b, answer = (first, second, whole) if operation in ("add", "mul") else (whole, first, second)
    expression, text = f"{a} {SIGNS[operation]} {b}", texts()[language]
    story = draw.random() < kind.stories
    prompt = draw.choice(text[operation]).format(a=a, b=b) if story else draw.choice(text["ask"]).format(x=expression)
    return Problem(prompt, answer, language, operation, story, expression, text["say"].format(c=answer))


def split_of(operation: str, first: int, second: int) -> Split:
    """Where the fact of two summands or factors belongs, whatever is asked of it."""
    fact = f"{'sum' if operation in ('add', 'sub') else 'product'} {min(first, second)} {max(first, second)}"
    drawn = int.from_bytes(hashlib.blake2b(fact.encode(), digest_size=8).digest(), "little") / 2**64
    return "held-out" if drawn < HELD_OUT else "train"
