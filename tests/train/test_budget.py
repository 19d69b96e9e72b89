"""Budgets: which model a machine gets, what each stage gets, what is said, and flags that `qwen2 pretrain` takes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2.cli.app import main
from qwen2.config import ModelConfig
from qwen2.data.shards import Shards
from qwen2.tokenizer import Tokenizer
from qwen2.train import budget as module
from qwen2.train.budget import RUNGS, STAGES, Budget, Planned, Stage, choose, make_budget
from qwen2.train.pretrain import flops_per_token


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A machine that multiplies 100 GFLOP/s, and trains as many tokens a second as each stage is given here."""
    speeds = {"short": 4000.0, "long": 2000.0}
    monkeypatch.setattr(module, "product_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(module, "tokens_per_second", lambda shards, tokenizer, config, stage, seconds: speeds[stage.name])
    return speeds


@pytest.fixture
def tokenizer(shards: Shards) -> Tokenizer:
    return Tokenizer.from_folder(shards.folder / "tokenizer")


def test_every_rung_is_larger_than_the_one_before_and_fits_every_block():
    sizes = [shape.parameters() for shape in RUNGS.values()]
    assert sizes == sorted(sizes)
    for name, shape in RUNGS.items():
        assert shape.ffn % 32 == shape.hidden % 32 == 0
        assert name == "tiny" or shape.head_dim == 64


def test_more_flops_get_a_larger_model():
    shapes = {name: shape for name, shape in RUNGS.items() if name != "tiny"}
    needed = {name: flops_per_token(shape) * 4 * shape.parameters() for name, shape in shapes.items()}
    assert choose(shapes, 1.0, 4) == "2m"
    for name, flops in needed.items():
        assert choose(shapes, flops * 1.01, 4) == name


def test_stages_get_their_share_of_the_time_at_their_own_speed(shards: Shards, tokenizer: Tokenizer, rates: dict[str, float]):
    plan = make_budget(shards, tokenizer, 100.0, size="2m")
    short, long = plan.stages["short"], plan.stages["long"]
    assert short.steps == int(0.8 * 100 * 4000 / (256 * 16))
    assert long.steps == int(0.2 * 100 * 2000 / (2048 * 2))
    assert plan.tokens == short.steps * 4096 + long.steps * 4096
    assert plan.flops == plan.tokens * flops_per_token(plan.config)
    assert plan.config.context == 2048
    assert plan.config.vocab % 64 == 0


def test_a_slow_machine_trains_less_and_says_so(shards: Shards, tokenizer: Tokenizer, rates: dict[str, float]):
    fast = make_budget(shards, tokenizer, 600.0, size="2m", ratio=0.5)
    rates.update(short=400.0, long=200.0)
    slow = make_budget(shards, tokenizer, 600.0, size="2m", ratio=0.5)
    assert slow.tokens < 0.11 * fast.tokens
    assert len(fast.lines()) == 2
    assert re.search(r", and trains at \d+ GFLOP/s$", slow.lines()[0])
    assert slow.lines()[1].startswith("10 min 0 s of training: ")
    assert re.search(r"that is 0\.3 tokens a parameter; the 0\.5 that are wanted would take \d+ min \d+ s here", slow.lines()[2])
    longer = replace(slow, seconds=20.0)
    assert longer.lines()[1].startswith("20 s of training: ")


def test_the_smallest_stage_has_a_step(shards: Shards, tokenizer: Tokenizer, rates: dict[str, float]):
    assert [planned.steps for planned in make_budget(shards, tokenizer, 0.001).stages.values()] == [1, 1]


def test_real_steps_are_timed(shards: Shards, tokenizer: Tokenizer):
    plan = make_budget(shards, tokenizer, 5.0, (Stage("only", 32, 2, 1.0, 10_000.0),), size="tiny", trial=0.05)
    assert plan.stages["only"].tokens_per_s > 1
    assert plan.product_rate > 1e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": 0.0}, "0 seconds at 4 tokens a parameter"),
        ({"ratio": -1.0}, "both must be above 0"),
        ({"size": "7b"}, "size '7b': must be one of tiny, 2m"),
        ({"stages": STAGES[:1]}, "add up to 0.8, not to 1"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, object], message: str, shards: Shards, tokenizer: Tokenizer):
    with pytest.raises(ValueError, match=message):
        make_budget(shards, tokenizer, **{"seconds": 10.0, **change})


def test_stages_that_cannot_be():
    with pytest.raises(ValueError, match="stage x: 0 rows of 8 tokens"):
        Stage("x", 8, 0, 1.0, 1e4)
    with pytest.raises(ValueError, match=r"stage x: share 1\.5"):
        Stage("x", 8, 1, 1.5, 1e4)


def test_the_verb_writes_flags_that_pretrain_takes(
    shards: Shards, tmp_path: Path, rates: dict[str, float], capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "budget"
    words = ["budget", str(shards.folder), "--out", str(out), "--seconds", "0.5", "--size", "tiny"]
    assert main([*words, "--stage", "short=32x4:0.5", "--stage", "long=64x2:0.5@1000000"]) == 0
    assert "GFLOP/s" in capsys.readouterr().out
    assert (out / "long.flags").read_text() == "--steps 3 --length 64 --batch 2 --rope-theta 1000000 --micro-batch 2\n"
    written = json.loads((out / "budget.json").read_text())
    assert written["stages"]["short"]["steps"] == 7
    assert ModelConfig.from_hf(json.loads((out / "config.json").read_text())).context == 64
    flags = (out / "short.flags").read_text().split()
    config = str(out / "config.json")
    assert main(["pretrain", str(shards.folder), "--out", str(tmp_path / "run"), "--config", config, "--no-tensorboard", *flags]) == 0
    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*words[:3], str(tmp_path / "b"), *words[4:], "--stage", "x"]) == 1
    assert "stage 'x': write NAME=LENGTHxBATCH:SHARE@BASE" in capsys.readouterr().err


def test_what_is_said_holds_for_any_plan(shards: Shards, tokenizer: Tokenizer, rates: dict[str, float]):
    plan = make_budget(shards, tokenizer, 60.0)
    richer = replace(plan, stages={"one": Planned(STAGES[0], 10**6, 1e6)})
    assert isinstance(richer, Budget)
    assert richer.to_json()["tokens"] == 10**6 * 4096
    assert len(richer.lines()) == 2
