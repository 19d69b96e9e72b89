"""The order in which documents are trained on: shares per language and source, deterministic, with a state that fits in a line.

A group is one (language, source) of the training split. Its size is its tokens times its weight; languages get shares of the
tokens in proportion to their sizes to the power 1 / temperature (1: as they are, 3: rare languages are repeated; "temperature
up-sampling" of multilingual training, Arivazhagan et al. 2019, arXiv 1907.05019), the sources of a language in proportion to
their sizes. The next document always comes from the group that is furthest behind its share, and within a group documents come
in an order drawn anew for every epoch, computed, not stored. With `least`, only documents of so many tokens are there; a language
that has none so long keeps all of its own, so that none is lost to a stage of long rows.

Left out: packing into rows (`batches.py`), and which rank takes which document.

    walk = order(Shards.open("corpus/shards"), Mixture(temperature=2.0), seed=0)
    ids, state = next(walk), walk.state()
"""

from __future__ import annotations

import hashlib
import heapq
import math
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen2.data.shards import Documents, Ids, Shard, Shards

Group = tuple[str, str]  # language, source
AT_ONCE = 256  # turns of a group whose documents are computed together
ROUNDS = 4  # of the permutation network; Luby and Rackoff 1988: four suffice for a random-looking one
FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # multipliers of SplitMix64 (Steele et al. 2014)


@dataclass(frozen=True)
class Mixture:
    """Weights per (language, source), 1 where none is given and 0 to leave a group out; "*" stands for every language or source.

    A weight set for the pair wins over the language's, that over the source's. ValueError for a weight or a temperature that is
    no number fit for it.
    """

    weights: Mapping[Group, float] = field(default_factory=dict)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for group, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"weight of {'/'.join(group)}: {weight} is not a number from 0 up")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature {self.temperature}: must be above 0")

    @classmethod
    def parse(cls, weights: Mapping[str, float], temperature: float = 1.0) -> Mixture:
        """From names as recipes write them: {"en/wiki": 0.5, "lo/*": 2}."""
        pairs: dict[Group, float] = {}
        for name, weight in weights.items():
            language, slash, source = name.partition("/")
            if not (language and slash and source):
                raise ValueError(f"weight {name!r}: write language/source, as in en/wiki or */code")
            pairs[language, source] = float(weight)
        return cls(pairs, temperature)

    def weight(self, language: str, source: str) -> float:
        """The weight of one group."""
        for key in ((language, source), (language, "*"), ("*", source), ("*", "*")):
            if key in self.weights:
                return self.weights[key]
        return 1.0

    def unmatched(self, groups: Iterable[Group]) -> list[Group]:
        """The weights that are of none of these groups."""
        there = list(groups)
        return [(one, other) for one, other in self.weights if not any(one in ("*", g[0]) and other in ("*", g[1]) for g in there)]

    def times(self, tokens: Mapping[Group, int], total: int) -> dict[Group, float]:
        """How often each group is read where `total` tokens are trained on. ValueError as `shares` has it."""
        return {group: total * share / tokens[group] for group, share in self.shares(tokens).items() if share}

    def shares(self, tokens: Mapping[Group, int]) -> dict[Group, float]:
        """The share of each group in the tokens that are trained on; they add up to 1. ValueError where nothing has a share.

        A weight for a group that is not there is a ValueError too: it would change nothing.
        """
        for language, source in self.unmatched(tokens):
            raise ValueError(f"weight of {language}/{source}: there is no such language and source among the shards")
        sizes = {group: count * self.weight(*group) for group, count in tokens.items()}
        languages: dict[str, float] = {}
        for (language, _), size in sizes.items():
            languages[language] = languages.get(language, 0.0) + size
        powers = {language: size ** (1 / self.temperature) for language, size in languages.items() if size}
        if not powers:
            raise ValueError("the mixture leaves no document: every group is empty or has weight 0")
        total = sum(powers.values())
        return {g: powers[g[0]] / total * size / languages[g[0]] if size else 0.0 for g, size in sizes.items()}


@dataclass(frozen=True)
class Drawn:
    """One document in its turn: where it lies, its ids (the end id among them), and how often its group was read before."""

    language: str
    source: str
    shard: str
    document: int
    epoch: int
    ids: Ids


def sizes(shards: Shards, split: str = "train", least: int = 0) -> dict[Group, int]:
    """The tokens of each group of a split, in documents that are `long_enough`."""
    tokens: dict[Group, int] = {}
    documents = long_enough(shards, least, split) if least > 1 else {}
    for record in shards.select(split):
        group, kept = (record.language, record.source), record.tokens
        if record.name in documents:
            kept = int(_lengths(shards, record)[documents[record.name]].sum())
        tokens[group] = tokens.get(group, 0) + kept
    return tokens


def long_enough(shards: Shards, least: int, split: str = "train") -> dict[str, npt.NDArray[np.intp]]:
    """Which documents of each shard have at least `least` tokens; of a language that has none such, all. ValueError where none has."""
    lengths = {record.name: _lengths(shards, record) for record in shards.select(split)}
    short = too_short(shards, least, split)
    if lengths and short == sorted({record.language for record in shards.select(split)}):
        longest = max((int(found.max()) for found in lengths.values() if len(found)), default=0)
        raise ValueError(f"least_document {least}: no document of {shards.folder} is so long; the longest has {longest:,} tokens")
    return {
        record.name: np.flatnonzero(lengths[record.name] >= (0 if record.language in short else least)) for record in shards.select(split)
    }


def too_short(shards: Shards, least: int, split: str = "train") -> list[str]:
    """Languages without a document of `least` tokens, by name."""
    records = shards.select(split)
    return sorted({r.language for r in records} - {r.language for r in records if (_lengths(shards, r) >= least).any()})


def _lengths(shards: Shards, record: Shard) -> npt.NDArray[np.int64]:
    """The tokens of each document of a shard."""
    return np.diff(shards.documents(record).ends, prepend=np.uint64(0)).astype(np.int64)


def most_often(times: Mapping[Group, float]) -> list[tuple[str, float]]:
    """Names with how often each is read, the most often first: a language where its sources are read alike, else language/source."""
    languages: dict[str, dict[str, float]] = {}
    for (language, source), count in times.items():
        languages.setdefault(language, {})[source] = count
    named: dict[str, float] = {}
    for language, counts in languages.items():
        if max(counts.values()) <= 1.01 * min(counts.values()):
            named[language] = max(counts.values())
        else:
            named |= {f"{language}/{source}": count for source, count in counts.items()}
    return sorted(named.items(), key=lambda entry: (-entry[1], entry[0]))


def order(shards: Shards, mixture: Mixture, seed: int, split: str = "train", least: int = 0) -> Order:
    """The endless walk over a split's documents of at least `least` tokens; the same arguments give the same walk."""
    return Order(shards, mixture, seed, split, least)


class Order(Iterator[Drawn]):
    """`next` gives a document, `state` where the walk stands, `resume` goes on from there."""

    def __init__(self, shards: Shards, mixture: Mixture, seed: int, split: str = "train", least: int = 0) -> None:
        self.groups: dict[Group, list[tuple[str, Documents]]] = {}
        for record in shards.select(split):
            self.groups.setdefault((record.language, record.source), []).append((record.name, shards.documents(record)))
        tokens = sizes(shards, split, least)
        if not tokens:
            raise ValueError(f"{shards.folder}: no documents of the split {split!r}")
        self.shares = {g: s for g, s in mixture.shares(tokens).items() if s > 0}
        self.tokens, self.seed = tokens, seed
        what: tuple[object, ...] = (seed, split, sorted(self.shares.items()), [r.sha256_tokens for r in shards.select(split)])
        what = (*what, least) if least > 1 else what
        self._of = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
        self._chosen = long_enough(shards, least, split) if least > 1 else {}
        counts = {g: [len(self._chosen.get(name, pile)) for name, pile in self.groups[g]] for g in self.shares}
        self._lengths = {g: sum(counts[g]) for g in self.shares}
        self._starts = {g: [0, *accumulate(counts[g])][:-1] for g in self.shares}
        self._blocks: dict[Group, tuple[tuple[int, int], list[int]]] = {}
        self._begin(dict.fromkeys(self.shares, (0, 0)))

    def _begin(self, places: Mapping[Group, tuple[int, int]]) -> None:
        """Stand where each group has given `documents`, `tokens` so far."""
        self.given = dict(places)
        self._heap = [(tokens / self.shares[group], group) for group, (_, tokens) in self.given.items()]
        heapq.heapify(self._heap)

    def __next__(self) -> Drawn:
        _, group = self._heap[0]
        documents, tokens = self.given[group]
        epoch, turn = divmod(documents, self._lengths[group])
        index = self._index(group, epoch, turn)
        place = bisect(self._starts[group], index) - 1
        name, pile = self.groups[group][place]
        index -= self._starts[group][place]
        if name in self._chosen:
            index = int(self._chosen[name][index])
        ids = pile[index]
        self.given[group] = (documents + 1, tokens + len(ids))
        heapq.heapreplace(self._heap, ((tokens + len(ids)) / self.shares[group], group))
        return Drawn(*group, name, index, epoch, ids)

    def _index(self, group: Group, epoch: int, turn: int) -> int:
        """Which document of the group has its turn; computed for the turns around it too, and kept until one lies outside."""
        block = epoch, turn // AT_ONCE
        known, indices = self._blocks.get(group, (None, []))
        if known != block:
            first, count = turn - turn % AT_ONCE, self._lengths[group]
            turns = np.arange(first, min(first + AT_ONCE, count))
            indices = permuted(turns, count, f"{self.seed}/{group[0]}/{group[1]}/{epoch}").tolist()
            self._blocks[group] = block, indices
        return indices[turn % AT_ONCE]

    def again(self, shard: str, document: int) -> Ids:
        """The ids of a document by where it lies. ValueError where it does not lie there."""
        pile = next((pile for group in self.groups.values() for name, pile in group if name == shard), None)
        if pile is None or not 0 <= document < len(pile):
            raise ValueError(f"document {document} of shard {shard!r}: not among the shards")
        return pile[document]

    def state(self) -> dict[str, Any]:
        """Where the walk stands, as JSON can hold it: documents and tokens that each group gave."""
        return {"of": self._of, "given": [[*group, *place] for group, place in self.given.items()]}

    def resume(self, state: Mapping[str, Any]) -> Order:
        """Go on from a `state`; ValueError where it is one of other shards, another mixture, another seed or another `least`."""
        if state.get("of") != self._of:
            raise ValueError("this state of the data order belongs to other shards, another mixture or another seed")
        self._begin({(language, source): (documents, tokens) for language, source, documents, tokens in state["given"]})
        return self


def permuted(turns: npt.NDArray[np.integer[Any]], count: int, key: str) -> npt.NDArray[np.uint64]:
    """The images of turns in a pseudo-random permutation of range(count): a Feistel network that walks on while it is outside."""
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.frombuffer(hashlib.sha256(key.encode()).digest(), "<u8")
    images, outside = turns.astype(np.uint64), np.arange(len(turns))
    while len(outside):
        left, right = images[outside] >> half, images[outside] & mask
        for i in range(ROUNDS):
            mixed = (right + keys[i : i + 1]) * FIRST  # of 64 bits, as all of it
            mixed = (mixed ^ mixed >> np.uint64(29)) * SECOND
            left, right = right, left ^ (mixed >> np.uint64(31)) & mask
        images[outside] = left << half | right
        outside = outside[images[outside] >= count]
    return images
