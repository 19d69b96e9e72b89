"""Rows of examples: each once an epoch, full, in an order of the seed, and exactly where they were after a pause."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.post.rows import packing
from qwen2.post.rows.packing import PackedRows


def lengths_of(count: int, most: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, most + 1, count)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60), st.integers(0, 5), st.booleans())
def test_an_epoch_has_every_example_once_and_no_row_is_too_long(lengths: list[int], seed: int, packed: bool) -> None:
    rows = PackedRows(np.array(lengths), 64, packed, seed)
    for epoch in range(2):
        plan = rows.plan(epoch)
        assert sorted(index for row in plan for index in row) == list(range(len(lengths)))
        assert all(sum(lengths[index] for index in row) <= 64 for row in plan)
        assert packed or all(len(row) == 1 for row in plan)


def test_rows_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = lengths_of(2000, 300)
    assert lengths.sum() / (512 * len(PackedRows(lengths, 512, True, 0).plan(0))) > 0.98
    monkeypatch.setattr(packing, "WINDOW", 100)  # also where few are laid out together
    assert lengths.sum() / (512 * len(PackedRows(lengths, 512, True, 0).plan(0))) > 0.95


def test_the_order_is_the_seeds_and_differs_from_epoch_to_epoch() -> None:
    lengths = lengths_of(200, 60)
    first, again, other = (PackedRows(lengths, 128, True, seed) for seed in (1, 1, 2))
    assert first.plan(0) == again.plan(0)
    assert first.plan(0) != other.plan(0)
    assert first.plan(0) != first.plan(1)


@pytest.mark.parametrize("at", [0, 1, 9, 23, 60])
def test_the_stream_goes_on_where_it_stood(at: int) -> None:
    lengths = lengths_of(80, 60)
    rows = PackedRows(lengths, 128, True, 3)
    for _ in range(at):
        next(rows)
    state = json.loads(json.dumps(rows.state()))
    other = PackedRows(lengths, 128, True, 3)
    other.resume(state)
    assert [next(other) for _ in range(50)] == [next(rows) for _ in range(50)]
    assert other.taken == at + 50


def test_rows_of_several_epochs_are_counted() -> None:
    rows = PackedRows(lengths_of(80, 60), 128, True, 3)
    assert rows.total(2) == len(rows.plan(0)) + len(rows.plan(1))
    assert rows.total(1.5) == len(rows.plan(0)) + round(len(rows.plan(1)) / 2)
    assert rows.total(0.001) == 1
    assert PackedRows(lengths_of(80, 60), 128, False, 3).total(2.5) == 200


@pytest.mark.parametrize("packed", [True, False])
def test_what_is_spread_over_epochs_is_read_once_in_all_of_them(packed: bool) -> None:
    lengths, spread = lengths_of(80, 60), list(range(10, 60))
    rows = PackedRows(lengths, 128, packed, 3, spread, 4)
    epochs = [sorted(index for row in rows.plan(epoch) for index in row) for epoch in range(5)]
    others = [index for index in range(80) if index not in spread]
    assert all([index for index in epoch if index not in spread] == others for epoch in epochs), "the others in every one"
    read = [[index for index in epoch if index in spread] for epoch in epochs]
    assert sorted(index for epoch in read[:4] for index in epoch) == spread
    assert {len(epoch) for epoch in read} <= {12, 13}, "as many in each"
    assert read[4] == read[0]
    assert rows.total(4) == sum(len(rows.plan(epoch)) for epoch in range(4))
    state = [next(rows) for _ in range(40)] and rows.state()
    again = PackedRows(lengths, 128, packed, 3, spread, 4)
    again.resume(state)
    assert [next(again) for _ in range(50)] == [next(rows) for _ in range(50)]


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="epochs would be empty: 3 texts spread over 4 epochs, and nothing else"):
        PackedRows(np.array([5, 5, 5]), 128, True, 0, [0, 1, 2], 4)
    with pytest.raises(ValueError, match="no examples"):
        PackedRows(np.empty(0, np.int64), 128, True, 0)
    with pytest.raises(ValueError, match="129 tokens does not fit into a row of 128"):
        PackedRows(np.array([5, 129]), 128, True, 0)
    with pytest.raises(ValueError, match="other examples"):
        PackedRows(np.array([5, 5]), 128, True, 0).resume({"epoch": 0, "row": 7, "taken": 7})
