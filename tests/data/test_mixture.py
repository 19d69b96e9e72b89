"""Mixtures: shares come out as asked, every document of an epoch comes once, and a walk goes on exactly where it stood."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.data.mixture import AT_ONCE, Mixture, Order, most_often, order, permuted, sizes, too_short
from qwen2.data.shards import Shards, ShardWriter, TokenizerInfo


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """900 tokens of English in two sources, 100 of Lao, one held-out document; small shards, so that groups have several."""
    folder = tmp_path_factory.mktemp("mixture")
    with ShardWriter(folder, TokenizerInfo("0" * 64, 1000, 999), shard_tokens=120) as writer:
        for language, source, count in (("en", "wiki", 60), ("en", "code", 30), ("lo", "wiki", 10)):
            for i in range(count):
                writer.add("train", language, source, [i] * 9, 9)
        writer.add("held-out", "th", "udhr", [1], 1)
    return Shards.open(folder)


def tokens_by(walk: Order, count: int, key: str) -> dict[str, float]:
    counted: Counter[str] = Counter()
    for drawn in islice(walk, count):
        counted[getattr(drawn, key)] += len(drawn.ids)
    return {name: number / counted.total() for name, number in counted.items()}


@pytest.mark.parametrize(
    ("mixture", "languages"),
    [
        (Mixture(), {"en": 0.9, "lo": 0.1}),
        (Mixture(temperature=2.0), {"en": 0.75, "lo": 0.25}),
        (Mixture.parse({"lo/*": 9}), {"en": 0.5, "lo": 0.5}),
        (Mixture.parse({"*/code": 0, "en/wiki": 0.5}), {"en": 0.75, "lo": 0.25}),
        (Mixture.parse({"en/*": 0}), {"lo": 1.0}),
    ],
)
def test_shares_come_out(mixture: Mixture, languages: dict[str, float], shards: Shards) -> None:
    got = tokens_by(order(shards, mixture, seed=1), 1000, "language")
    assert got == pytest.approx(languages, abs=0.003)


def test_sources_keep_their_proportion(shards: Shards) -> None:
    got = tokens_by(order(shards, Mixture.parse({"en/wiki": 2}, temperature=1000.0), seed=1), 1000, "source")
    assert got == pytest.approx({"wiki": 0.5 * 0.8 + 0.5, "code": 0.5 * 0.2}, abs=0.003)


def test_an_epoch_has_every_document_once_and_another_order(shards: Shards) -> None:
    walk = order(shards, Mixture.parse({"en/*": 0}), seed=3)
    epochs = [[int(drawn.ids[0]) for drawn in islice(walk, 10)] for _ in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert next(walk).epoch == 4


@pytest.mark.parametrize("mixture", [Mixture(temperature=3.0), Mixture.parse({"*/code": 4, "lo/*": 2}, 2.0)])
def test_how_often_each_group_is_read_is_known_before(mixture: Mixture, shards: Shards) -> None:
    walk = order(shards, mixture, seed=0)
    read: Counter[tuple[str, str]] = Counter()
    for drawn in islice(walk, 2000):
        read[drawn.language, drawn.source] += 1
    had = {("en", "wiki"): 60, ("en", "code"): 30, ("lo", "wiki"): 10}
    times = mixture.times(sizes(shards), 2000 * 10)
    assert times == pytest.approx({group: read[group] / count for group, count in had.items()}, abs=0.1)


def test_what_is_read_most_often_comes_first(shards: Shards) -> None:
    tokens = sizes(shards)
    assert [name for name, _ in most_often(Mixture(temperature=3.0).times(tokens, 1000))] == ["lo", "en"]
    named = most_often(Mixture.parse({"en/code": 4, "lo/*": 0}).times(tokens, 1800))
    assert named == [("en/code", pytest.approx(4.0)), ("en/wiki", pytest.approx(1.0))]


def test_the_walk_is_its_seed_s(shards: Shards) -> None:
    def walked(seed: int) -> list[tuple[str, int]]:
        return [(drawn.shard, drawn.document) for drawn in islice(order(shards, Mixture(), seed), 150)]

    assert walked(5) == walked(5) != walked(6)


def test_it_goes_on_where_it_stood(shards: Shards) -> None:
    walk = order(shards, Mixture(temperature=3.0), seed=2)
    for _ in range(77):
        next(walk)
    state = json.loads(json.dumps(walk.state()))
    rest = [(d.shard, d.document, d.epoch) for d in islice(walk, 300)]
    again = order(shards, Mixture(temperature=3.0), seed=2).resume(state)
    assert [(d.shard, d.document, d.epoch) for d in islice(again, 300)] == rest
    with pytest.raises(ValueError, match="belongs to other shards, another mixture or another seed"):
        order(shards, Mixture(temperature=3.0), seed=3).resume(state)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """English documents of 2 to 40 tokens in one source and of 2 to 9 in another, Lao ones of 2 to 6; shards that each hold a few."""
    folder = tmp_path_factory.mktemp("uneven")
    with ShardWriter(folder, TokenizerInfo("0" * 64, 1000, 999), shard_tokens=90) as writer:
        for language, source, most in (("en", "wiki", 40), ("en", "code", 9), ("lo", "wiki", 6)):
            for length in range(2, most + 1):
                writer.add("train", language, source, [length] * (length - 1), length)
    return Shards.open(folder)


@pytest.mark.parametrize("least", [0, 1, 3, 6, 20])
def test_documents_that_are_too_short_are_not_drawn(least: int, uneven: Shards) -> None:
    """Those that are come once an epoch each, with their own ids; a language that has none so long keeps all."""
    walk = order(uneven, Mixture(), seed=4, least=least)
    drawn: dict[tuple[str, str], list[int]] = {}
    again = []
    while not drawn or min(map(len, drawn.values())) < 100:
        one = next(walk)
        drawn.setdefault((one.language, one.source), []).append(len(one.ids))
        again.append((walk.again(one.shard, one.document).tolist(), one.ids.tolist()))
    assert all(found == wanted for found, wanted in again)
    lao = least if least <= 6 else 0
    expected = {
        ("en", "wiki"): [*range(max(2, least), 41)],
        ("en", "code"): [*range(max(2, least), 10)],
        ("lo", "wiki"): [*range(max(2, lao), 7)],
    }
    expected = {group: lengths for group, lengths in expected.items() if lengths}
    assert {group: sorted(lengths[: len(expected[group])]) for group, lengths in drawn.items()} == expected
    assert {group: count for group, count in sizes(uneven, least=least).items() if count} == {g: sum(n) for g, n in expected.items()}
    assert too_short(uneven, least) == (["lo"] if least > 6 else [])


def test_a_walk_over_long_documents_goes_on_where_it_stood(uneven: Shards) -> None:
    walk = order(uneven, Mixture(), seed=4, least=6)
    for _ in range(50):
        next(walk)
    rest = [(d.shard, d.document) for d in islice(order(uneven, Mixture(), seed=4, least=6).resume(walk.state()), 60)]
    assert rest == [(d.shard, d.document) for d in islice(walk, 60)]
    for other in (0, 7):
        with pytest.raises(ValueError, match="belongs to other shards, another mixture"):
            order(uneven, Mixture(), seed=4, least=other).resume(walk.state())


def test_a_weight_of_a_source_of_short_documents_is_no_mistake(uneven: Shards) -> None:
    walk = order(uneven, Mixture.parse({"en/code": 5, "lo/*": 0}), seed=0, least=10)
    assert {drawn.source for drawn in islice(walk, 80)} == {"wiki"}
    with pytest.raises(ValueError, match=r"least_document 41: no document of .* is so long; the longest has 40 tokens"):
        order(uneven, Mixture(), seed=0, least=41)


def test_held_out_is_never_drawn(shards: Shards) -> None:
    assert {drawn.language for drawn in islice(order(shards, Mixture(), seed=0), 300)} == {"en", "lo"}


@pytest.mark.parametrize(
    ("weights", "temperature", "message"),
    [
        ({"en/wiki": -1}, 1.0, "weight of en/wiki: -1"),
        ({"en/wiki": float("nan")}, 1.0, "weight of en/wiki: nan"),
        ({"en": 1}, 1.0, "weight 'en': write language/source"),
        ({"fr/*": 1}, 1.0, "weight of fr/\\*: there is no such"),
        ({"*/*": 0}, 1.0, "the mixture leaves no document"),
        ({}, 0.0, "temperature 0.0"),
    ],
)
def test_wrong_mixtures_are_named(weights: dict[str, float], temperature: float, message: str, shards: Shards) -> None:
    with pytest.raises(ValueError, match=message):
        order(shards, Mixture.parse(weights, temperature), seed=0)


def permuted_by_hand(turn: int, count: int, key: str) -> int:
    """The oracle: one turn at a time, in Python's integers."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask, keys = (1 << half) - 1, hashlib.sha256(key.encode()).digest()
    while True:
        left, right = turn >> half, turn & mask
        for i in range(4):
            mixed = (right + int.from_bytes(keys[8 * i : 8 * i + 8], "little")) * 0x9E3779B97F4A7C15 % 2**64
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 % 2**64
            left, right = right, left ^ (mixed >> 31) & mask
        turn = left << half | right
        if turn < count:
            return turn


@given(st.integers(1, 300), st.text(max_size=5))
def test_a_permutation_is_one(count: int, key: str) -> None:
    found = permuted(np.arange(count), count, key).tolist()
    assert sorted(found) == list(range(count))
    assert found == [permuted_by_hand(turn, count, key) for turn in range(count)]


@given(st.integers(1, 2**62), st.data())
def test_a_permutation_of_many_is_the_same_number_for_number(count: int, data: st.DataObject) -> None:
    turns = data.draw(st.lists(st.integers(0, count - 1), max_size=5))
    assert permuted(np.array(turns, np.int64), count, "key").tolist() == [permuted_by_hand(turn, count, "key") for turn in turns]


def test_a_group_of_many_documents_is_walked_as_by_hand(tmp_path: Path) -> None:
    """More than are computed together; left in the middle, and resumed."""
    with ShardWriter(tmp_path, TokenizerInfo("0" * 64, 1000, 999)) as writer:
        for i in range(AT_ONCE + 50):
            writer.add("train", "en", "wiki", [i], 1)
    shards, count = Shards.open(tmp_path), AT_ONCE + 50
    expected = [permuted_by_hand(turn % count, count, f"7/en/wiki/{turn // count}") for turn in range(2 * count)]
    walk = order(shards, Mixture(), seed=7)
    assert [drawn.document for drawn in islice(walk, AT_ONCE + 20)] == expected[: AT_ONCE + 20]
    again = order(shards, Mixture(), seed=7).resume(walk.state())
    assert [drawn.document for drawn in islice(again, 2 * count - AT_ONCE - 20)] == expected[AT_ONCE + 20 :]
