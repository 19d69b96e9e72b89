"""The rows of pre-training are made ahead, by a thread, and nothing of it shows but the time: state, resuming, other ranks, errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.config import tiny
from qwen2.data.batches import Batch, Row, Rows, pack
from qwen2.data.mixture import order
from qwen2.data.shards import Shards
from qwen2.tokenizer import Tokenizer
from qwen2.train.metrics import read_lines
from qwen2.train.pretrain import STREAMS, Data, Job, pretrain
from qwen2.train.stage import PretrainSettings
from qwen2.train.world import World


def settings(**changes: Any) -> PretrainSettings:
    given: dict[str, Any] = {"steps": 8, "length": 48, "batch": 4, "micro_batch": 3, "log_every": 1, "save_every": 3, "tensorboard": False}
    return PretrainSettings(**{**given, "measure": False, "precision": "float32", "lr": 3e-3, **changes})


def rank(number: int, of: int) -> World:
    world = World()
    world.data_rank, world.data_size = number, of
    return world


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        a.lengths == b.lengths and all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "labels", "positions"))
        for a, b in zip(ours, theirs, strict=True)
    )


def by_hand(shards: Shards, wanted: PretrainSettings, number: int, of: int) -> Iterator[list[Batch]]:
    """The oracle: all rows of a step, one after the other, of which a rank keeps its own."""
    rows = Rows(order(shards, wanted.mixture(), wanted.seed), wanted.length, max(wanted.batch, STREAMS))
    while True:
        own = [next(rows) for _ in range(wanted.batch)][number::of]
        yield [pack(own[start : start + wanted.micro_batch]) for start in range(0, len(own), wanted.micro_batch)]


@pytest.mark.parametrize(("number", "of"), [(0, 1), (0, 2), (3, 4)])
def test_a_rank_gets_its_rows_and_makes_no_others(number: int, of: int, shards: Shards, monkeypatch: pytest.MonkeyPatch):
    wanted = settings(batch=8)
    oracle = by_hand(shards, wanted, number, of)
    expected = [next(oracle) for _ in range(5)]
    made, make = list[int](), Rows.__next__

    def counted(rows: Rows) -> Row:
        made.append(threading.get_ident())
        return make(rows)

    monkeypatch.setattr(Rows, "__next__", counted)
    data = Data(shards, wanted, rank(number, of))
    for batches in expected:
        assert same(data.next_step(), batches)
    wait(data.coming)
    assert len(made) == 6 * 8 // of, "five steps, and one ahead"
    assert threading.get_ident() not in made


def test_the_state_is_that_of_what_was_handed_over(shards: Shards):
    data, oracle = Data(shards, settings(), World()), by_hand(shards, settings(), 0, 1)
    states = [data.state()]
    steps = []
    for _ in range(4):
        steps.append(data.next_step())
        wait(data.coming)  # the next step is whole, and nobody has it yet
        states.append(json.loads(json.dumps(data.state())))
    assert [same(step, next(oracle)) for step in steps] == [True] * 4
    assert len({json.dumps(state) for state in states}) == 5
    for number, state in enumerate(states[:-1]):
        fresh = Data(shards, settings(), World())
        fresh.resume(state)
        assert fresh.state() == state
        assert same(fresh.next_step(), steps[number])
    data.resume(states[1])  # as a run that goes back does, with a step made ahead that must not come
    assert data.state() == states[1]
    assert same(data.next_step(), steps[1])
    assert data.state() == states[2]
    with pytest.raises(ValueError, match="0 open documents, there are 64 here"):
        data.resume({**states[1], "open": []})


def test_what_is_wrong_with_a_shard_ends_the_step_that_would_read_it(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The sixth step's rows cannot be read, which the thread knows during the fifth: that one is done, and what it saved goes on."""

    def job(out: str, resume: bool = False) -> Job:
        model = replace(tiny(), eos=(509,), bos=509, context=48)
        return Job(shards, Tokenizer.from_folder(shards.folder / "tokenizer"), model, settings(), tmp_path / out, resume=resume)

    pretrain(job("whole"))
    made, make = [0], Rows.__next__

    def damaged(rows: Rows) -> Row:
        made[0] += 1
        if made[0] > 5 * 4:
            raise OSError(5, "Input/output error")
        return make(rows)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "__next__", damaged)
        with pytest.raises(OSError, match="Input/output error"):
            pretrain(job("cut"))
        data = Data(shards, settings(), World())
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                data.next_step()
    assert [line["step"] for line in read_lines(tmp_path / "cut" / "metrics.jsonl")][-1] == 5
    pretrain(job("cut", resume=True))
    cut, whole = ((tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("cut", "whole"))
    assert cut == whole
