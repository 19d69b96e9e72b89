"""Packing: every token once, labels across row ends, positions, resuming anywhere, documents for evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2.data.batches import Rows, pack, whole_documents


@dataclass
class Drawn:
    shard: str
    document: int
    ids: np.ndarray


class Cycle:
    """A walk over documents in a circle."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents, self.turn = [np.array(d, np.uint16) for d in documents], 0

    def __next__(self) -> Drawn:
        document = self.turn % len(self.documents)
        self.turn += 1
        return Drawn("a", document, self.documents[document])

    def again(self, shard: str, document: int) -> np.ndarray:
        assert shard == "a"
        return self.documents[document]

    def state(self) -> dict[str, Any]:
        return {"turn": self.turn}

    def resume(self, state: Mapping[str, Any]) -> Cycle:
        self.turn = state["turn"]
        return self


def test_by_hand():
    rows = Rows(Cycle([[1, 2, 0], [3, 4, 5, 6, 7, 0], [0]]), length=5)
    batch = pack([next(rows), next(rows)])
    assert batch.tokens.tolist() == [1, 2, 0, 3, 4, 5, 6, 7, 0, 0]
    assert batch.labels.tolist() == [2, 0, -100, 4, 5, 6, 7, 0, -100, -100]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]
    assert batch.lengths == (3, 2, 4, 1)
    assert batch.targets == 7
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


DOCUMENTS = st.lists(st.lists(st.integers(0, 60_000), max_size=20), min_size=1, max_size=6).filter(lambda d: any(d))


@given(DOCUMENTS, st.integers(1, 12), st.integers(1, 4))
def test_every_token_comes_once_and_every_successor_is_a_label(documents: list[list[int]], length: int, streams: int):
    """Each stream, read by itself, is whole documents end to end; together they are the walk's, none twice and none left out."""
    rows, walk = Rows(Cycle(documents), length, streams), Cycle(documents)
    count = 3 * sum(map(len, documents)) // length + 1
    made = [[next(rows) for _ in range(streams)] for _ in range(count)]
    expected: list[list[int]] = [[] for _ in range(streams)]
    labels: list[list[int]] = [[] for _ in range(streams)]
    for number in range(count):  # as the rows take them: a stream that has too little for its row gets the walk's next document
        for stream in range(streams):
            while len(expected[stream]) < (number + 1) * length:
                document = next(walk).ids.tolist()
                expected[stream] += document
                labels[stream] += document[1:] + [-100] * (len(document) > 0)
    for stream in range(streams):
        batch = pack([several[stream] for several in made])
        assert batch.tokens.tolist() == expected[stream][: count * length]
        assert batch.labels.tolist() == labels[stream][: count * length]
        assert sum(batch.lengths) == count * length
        ends = np.cumsum(batch.lengths)
        assert set(range(length, count * length + 1, length)) <= set(ends.tolist())  # no piece crosses a row's end


def test_a_long_document_is_no_step_of_its_own():
    rows = Rows(Cycle([[1] * 40, [2] * 40, [3] * 40, [4] * 40]), length=5, streams=4)
    assert [set(next(rows).tokens.tolist()) for _ in range(8)] == [{1}, {2}, {3}, {4}] * 2


@given(DOCUMENTS, st.integers(1, 12), st.integers(0, 15), st.integers(1, 4))
def test_resumed_anywhere_the_rows_are_the_same(documents: list[list[int]], length: int, after: int, streams: int):
    rows = Rows(Cycle(documents), length, streams)
    for _ in range(after):
        next(rows)
    state = json.loads(json.dumps(rows.state()))
    other = Rows(Cycle(documents), length, streams).resume(state)
    for _ in range(5):
        ours, theirs = next(rows), next(other)
        assert (ours.tokens == theirs.tokens).all()
        assert (ours.labels == theirs.labels).all()
        assert ours.lengths == theirs.lengths
    assert rows.state() == other.state()


@given(DOCUMENTS, st.integers(1, 12), st.lists(st.booleans(), max_size=20), st.integers(1, 4))
def test_rows_that_are_passed_by_change_no_other(documents: list[list[int]], length: int, wanted: list[bool], streams: int):
    rows, all_rows = Rows(Cycle(documents), length, streams), Rows(Cycle(documents), length, streams)
    for one in [*wanted, True]:
        expected = next(all_rows)
        if one:
            row = next(rows)
            assert (row.tokens.tolist(), row.labels.tolist()) == (expected.tokens.tolist(), expected.labels.tolist())
            assert row.lengths == expected.lengths
        else:
            rows.skip()
        assert rows.state() == all_rows.state()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="length 0"):
        Rows(Cycle([[1]]), 0)
    with pytest.raises(ValueError, match="streams 0"):
        Rows(Cycle([[1]]), 4, 0)
    with pytest.raises(ValueError, match="without a token"):
        next(Rows(Cycle([[], []]), 4))
    state = {"walk": {"turn": 0}, "turn": 0, "open": [["a", 0, 7]]}
    with pytest.raises(ValueError, match="7 tokens into a document of 2"):
        Rows(Cycle([[1, 2]]), 4).resume(state)
    with pytest.raises(ValueError, match="1 open documents, there are 2 here"):
        Rows(Cycle([[1, 2]]), 4, 2).resume(state)


def test_documents_for_evaluation_are_cut_and_none_is_lost():
    documents = [np.arange(7), np.arange(100, 103), np.arange(0), np.arange(50, 51)]
    batches = list(whole_documents(documents, length=3, tokens=6))
    assert [b.lengths for b in batches] == [(3, 3), (1, 3, 1)]
    assert torch.cat([b.tokens for b in batches]).tolist() == [*range(7), 100, 101, 102, 50]
    assert torch.cat([b.labels for b in batches]).tolist() == [1, 2, 3, 4, 5, 6, -100, 101, 102, -100, -100]
