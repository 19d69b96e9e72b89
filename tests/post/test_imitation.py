"""The SFT term of preference losses, which is reported apart from what they say of preferences."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qwen2.train.metrics import read_lines
from tests.post.test_dpo import run


def test_what_is_imitated_is_said_apart(tmp_path: Path):
    """Without its SFT term the loss of the first step is that of nothing preferred yet, in training and in the evaluation before it."""
    first = {}
    for name, changes in {"dpo": {"sft": 0.1}, "ipo": {"loss": "ipo", "sft": 2.0}, "orpo": {"loss": "orpo"}, "plain": {}}.items():
        run(tmp_path / name, steps=1, warmup=0.0, **changes)
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        first[name] = [next(line["eval"] for line in lines if "eval" in line), next(line for line in lines if "loss" in line)]
    for found in first["dpo"]:
        assert found["imitation"] > 1
        assert found["loss"] - 0.1 * found["imitation"] == pytest.approx(math.log(2), abs=1e-4)
    for found in first["ipo"]:
        assert found["loss"] - 2 * found["imitation"] == pytest.approx(25, abs=1e-2)
    for found, term in zip(first["orpo"], first["dpo"], strict=True):
        assert found["imitation"] == pytest.approx(term["imitation"], rel=1e-5)
        assert 0 < found["loss"] - found["imitation"] < 1
    assert not any("imitation" in found for found in first["plain"])
