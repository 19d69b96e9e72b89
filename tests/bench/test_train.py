"""bench/train.py times what users run: the loop itself, with a task of fixed rows."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from qwen2.config import MoEConfig, tiny
from qwen2.train.loop import Loop

PROGRAM = Path(__file__).parents[2] / "bench" / "peer" / "own_step.py"


@pytest.mark.parametrize("config", [tiny(), tiny(moe=MoEConfig(4, 2, 32, 64, aux_coef=0.01))], ids=["dense", "mixture"])
def test_what_is_timed_is_the_loops_own_step(config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"config": config.to_hf(), "batch": 2, "length": 16, "precision": "fp32", "steps": 2, "warmup": 1, "threads": 1, "isa": None}
    taken, begin = [], Loop.step

    def stepped(self: Loop) -> object:
        step = begin(self)
        taken.append((self.state.step, self.task.flops, sorted(step.sums)))  # type: ignore[union-attr]
        return step

    monkeypatch.setattr(Loop, "step", stepped)
    monkeypatch.setattr(sys, "argv", ["own_step.py", json.dumps(asked)])
    runpy.run_path(str(PROGRAM))["main"]()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [step for step, _, _ in taken] == [1, 2, 3]
    assert len(found["seconds"]) == 2
    assert found["weights"] == config.parameters()
    assert taken[0][1] > 0
    assert ("balance" in taken[0][2]) == (config.moe is not None)
