"""A quality score: the probability that a text is well-formed prose, from a logistic regression on hashed character n-grams.

It is trained here, for every corpus anew and in seconds: good examples are documents of the recipe's reference sources in all
languages, bad ones the same documents as extraction, encoding and generation spoil them: words in another order, characters
swapped, lost or of a wrong encoding, lines of a menu, one phrase over and over, markup and code between the words. Every
document gets one kind of damage, chosen by its hash. A fifth of the documents is held out, and how well they are told apart
(area under the curve, by language and by kind of damage) stands in the report. Perplexity under a small model was the other
choice: at some thousand tokens a second and core it costs a thousand times as much, and calls rare languages bad.

Left out: taste. What is true, kind or worth reading is not looked at.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from qwen2.data.recipe import Recipe
from qwen2.data.steps import CountedFilter
from qwen2.data.units import mixed

BUCKETS = 2**16
SIZES = (1, 2, 3)  # characters of an n-gram
LOOKED_AT = 1500  # characters of a text, from its middle
EPOCHS, BATCH, RATE, DECAY = 8, 32, 0.5, 1e-5
MOST = 4000  # documents that are learned from
HELD_OUT = 5  # every fifth


def features(text: str) -> tuple[Any, Any]:
    """Buckets and their weights: square roots of counts, of length 1 together. Empty for an empty text."""
    start = max(0, (len(text) - LOOKED_AT) // 2)
    codes = np.frombuffer(text[start : start + LOOKED_AT].encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
    found = []
    for n in SIZES:
        if len(codes) >= n:
            grams = np.full(len(codes) - n + 1, n, np.uint64)
            for i in range(n):
                grams = grams * np.uint64(0x100000001B3) + codes[i : i + len(grams)]
            found.append(mixed(grams) % np.uint64(BUCKETS))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    buckets, counts = np.unique(np.concatenate(found).astype(np.int64), return_counts=True)
    weights = np.sqrt(counts).astype(np.float32)
    return buckets, weights / np.linalg.norm(weights)


@dataclass
class Classifier:
    """Weights of the buckets and a constant."""

    weights: Any
    bias: float

    def score(self, text: str) -> float:
        """The probability that a text is good; 0 for an empty one."""
        buckets, values = features(text)
        return float(_sigmoid(self.weights[buckets] @ values + self.bias)) if len(buckets) else 0.0

    def save(self, path: Path) -> None:
        """As an .npz file."""
        np.savez(path, weights=self.weights, bias=self.bias)

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """What `save` wrote."""
        with np.load(path) as file:
            return cls(file["weights"], float(file["bias"]))


def _sigmoid(value: Any) -> Any:
    return 1 / (1 + np.exp(-np.clip(value, -30, 30)))


def train(examples: Sequence[tuple[str, bool]], seed: int) -> Classifier:
    """Logistic regression by AdaGrad in small batches, the same for the same examples and seed."""
    rows = [(features(text), float(good)) for text, good in examples]
    rows = [row for row in rows if len(row[0][0])]
    weights, squares = np.zeros(BUCKETS, np.float32), np.full(BUCKETS, 1e-6, np.float32)
    bias = 0.0
    generator = np.random.Generator(np.random.PCG64(seed))
    for _ in range(EPOCHS):
        order = generator.permutation(len(rows))
        for start in range(0, len(rows), BATCH):
            batch = [rows[i] for i in order[start : start + BATCH]]
            errors = [float(_sigmoid(weights[buckets] @ values + bias)) - good for (buckets, values), good in batch]
            together = np.concatenate([buckets for (buckets, _), _ in batch])
            gradients = np.concatenate([values * error for ((_, values), _), error in zip(batch, errors, strict=True)])
            touched, places = np.unique(together, return_inverse=True)
            slope = np.bincount(places, gradients).astype(np.float32) / len(batch) + DECAY * weights[touched]
            squares[touched] += slope**2
            weights[touched] -= RATE * slope / np.sqrt(squares[touched])
            bias -= 0.1 * sum(errors) / len(batch)
    return Classifier(weights, bias)


# ---------------------------------------------------------------- examples of what is bad


def _shuffled(text: str, draw: random.Random) -> str:
    """Words, or characters where there are no spaces, in another order."""
    parts = text.split(" ") if text.count(" ") * 15 > len(text) else list(text)
    draw.shuffle(parts)
    return (" " if text.count(" ") * 15 > len(text) else "").join(parts)


def _misread(text: str, draw: random.Random) -> str:
    """UTF-8 read as another encoding; text in ASCII loses its letters to marks of lost characters."""
    if text.isascii():
        return "".join("\ufffd" if c.isalpha() and draw.random() < 0.15 else c for c in text)
    return text.encode("utf-8").decode(draw.choice(["cp1252", "latin-1", "cp437"]), "replace")


def _mistyped(text: str, draw: random.Random) -> str:
    """Every sixth letter swapped, lost or doubled, as bad recognition does."""
    letters = list(text)
    for place in range(len(letters) - 1):
        if letters[place].isalpha() and draw.random() < 0.18:
            kind = draw.randrange(3)
            if kind == 0:
                letters[place], letters[place + 1] = letters[place + 1], letters[place]
            else:
                letters[place] = "" if kind == 1 else letters[place] * 2
    return "".join(letters)


def _menu(text: str, draw: random.Random) -> str:
    """A page's navigation: scraps of the text between bars, numbers and arrows."""
    words = text.split()
    scraps = [" ".join(words[i : i + draw.randint(1, 2)])[:18] for i in range(0, max(1, len(words) - 2), 3)]
    return "".join(scrap + draw.choice([" | ", " > ", "\n", " \u2022 ", " (3)\n", " [+] ", " / "]) for scrap in scraps)


def _repeated(text: str, draw: random.Random) -> str:
    """One phrase over and over."""
    start = draw.randrange(max(1, len(text) - 40))
    return text[start : start + draw.randint(15, 40)].strip() * (len(text) // 30 + 2)


def _marked_up(text: str, draw: random.Random) -> str:
    """Markup, style and script between the words."""
    junk = [
        "<div class='x'>",
        "</a>",
        "&nbsp;",
        "{margin:0;",
        "var i=0;",
        "#e1e1e1",
        "px;}",
        'href="?p=2"',
        "\\u00e9",
        "function(){",
        "==",
        "0x1f",
    ]
    words = text.split(" ") if " " in text else [text[i : i + 6] for i in range(0, len(text), 6)]
    return " ".join(word + draw.choice(junk) if draw.random() < 0.3 else word for word in words)


DAMAGE: dict[str, Callable[[str, random.Random], str]] = {
    "words in another order": _shuffled,
    "wrong encoding": _misread,
    "letters swapped": _mistyped,
    "a page's menu": _menu,
    "one phrase repeated": _repeated,
    "markup between words": _marked_up,
}


def number_of(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{text}".encode("utf-8", "replace"), digest_size=8).digest(), "little")


def learn(documents: Iterable[tuple[str, str]], seed: int) -> tuple[Classifier, dict[str, Any]]:
    """From (language, text) of good documents: the classifier, and how it does on a fifth of them that it did not see.

    ValueError where there are fewer than 50 documents.
    """
    chosen = balanced(((language, text[:LOOKED_AT]) for language, text in documents if text.strip()), seed)
    if len(chosen) < 50:
        raise ValueError(
            f"{len(chosen)} documents to learn quality from: 50 are needed; mark more sources as reference, or leave the step out"
        )
    seen: list[tuple[str, bool]] = []
    held: list[tuple[str, str, str, str]] = []
    kinds = list(DAMAGE)
    for language, text in chosen:
        number = number_of(text, seed)
        kind = kinds[number % len(kinds)]
        bad = DAMAGE[kind](text, random.Random(number))
        if number // 7 % HELD_OUT == 0:
            held.append((language, kind, text, bad))
        else:
            seen += [(text, True), (bad, False)]
    classifier = train(seen, seed)
    scored = [(language, kind, classifier.score(good), classifier.score(bad)) for language, kind, good, bad in held]
    measured = {
        "trained_on": len(seen) // 2,
        "held_out": len(held),
        "auc": auc([row[2] for row in scored], [row[3] for row in scored]),
        "auc_by_language": _by(scored, 0),
        "auc_by_damage": _by(scored, 1),
    }
    return classifier, measured


def balanced(documents: Iterable[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    """At most MOST different (language, text), of each language those with the smallest hashes, and of none more than its share.

    Never more than MOST are held while documents come: the share shrinks with each new language, and what is cut off stays so.
    """
    piles: dict[str, Smallest] = {}
    for language, text in documents:
        if language not in piles:
            piles[language] = Smallest()
            for pile in piles.values():
                pile.cut(MOST // len(piles))
        piles[language].add(number_of(text, seed + 1), text)
    return [(language, text) for language in sorted(piles) for text in piles[language].texts()]


class Smallest:
    """Of the texts that are added, those with the smallest numbers, each once."""

    def __init__(self) -> None:
        self.most = 0
        self._heap: list[tuple[int, str]] = []  # the largest number first, negated
        self._numbers: set[int] = set()

    def cut(self, most: int) -> None:
        """Hold no more than `most` from now on."""
        self.most = most
        while len(self._heap) > most:
            self._numbers.discard(-heapq.heappop(self._heap)[0])

    def add(self, number: int, text: str) -> None:
        """One more, where it is among the smallest and new."""
        if number in self._numbers or (len(self._heap) == self.most and (not self.most or number > -self._heap[0][0])):
            return
        self._numbers.add(number)
        heapq.heappush(self._heap, (-number, text))
        self.cut(self.most)

    def texts(self) -> list[str]:
        """By number."""
        return [text for _, text in sorted(self._heap, reverse=True)]


def _by(scored: list[tuple[str, str, float, float]], column: int) -> dict[str, float]:
    names = sorted({str(row[column]) for row in scored})
    return {
        name: auc([row[2] for row in scored if row[column] == name], [row[3] for row in scored if row[column] == name]) for name in names
    }


def auc(good: Sequence[float], bad: Sequence[float]) -> float:
    """The probability that a good text has the higher score, ties counted half; 0.5 where there are none."""
    if not good or not bad:
        return 0.5
    values = np.array([*good, *bad])
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return round(float((ranks[: len(good)].sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad))), 4)


class QualityFilter(CountedFilter):
    """Drops documents below their language's threshold, and writes the score into the document."""

    name = "quality"

    def __init__(self, path: str, recipe: Recipe, counts: str) -> None:
        super().__init__(counts)
        self.path, self.recipe = path, recipe

    def begin(self, rank: int) -> None:
        """Read the classifier."""
        self.classifier = Classifier.load(Path(self.path))

    def look(self, document: Document) -> str | None:
        """One reason."""
        score = self.classifier.score(document.text)
        document.metadata["quality"] = round(score, 3)
        return "low quality" if score < self.recipe.limits(document.metadata["language"]).quality else None
