"""bench/lora.py times what users run: the loop's own step with adapters, of new weights or of a file's packed ones."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from qwen2 import kernels
from qwen2.config import tiny
from qwen2.train.loop import Loop
from qwen2.weights.export import to_gguf
from tests.conftest import tiny_model

PROGRAM = Path(__file__).parents[2] / "bench" / "peer" / "own_lora.py"


@pytest.mark.parametrize("packed", [False, True], ids=["weights", "packed"])
def test_what_is_timed_is_the_loops_own_step(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if packed and kernels.isa() is None:
        pytest.skip("this installation has no kernels for this processor")
    asked = {"config": tiny(tied=True).to_hf(), "batch": 2, "length": 16, "precision": "fp32", "recompute": "layers", "rank": 4}
    asked |= {"steps": 2, "warmup": 1, "threads": 1, "isa": None}
    if packed:
        to_gguf(tiny_model(), tmp_path / "model.gguf", "Q8_0")
        asked["file"] = str(tmp_path / "model.gguf")
    taken, begin = [], Loop.step

    def stepped(self: Loop) -> object:
        step = begin(self)
        learned = [name for name, parameter in self.network.named_parameters() if parameter.requires_grad]
        taken.append((self.state.step, self.network.packed, len(learned), all("lora_" in name for name in learned)))
        return step

    monkeypatch.setattr(Loop, "step", stepped)
    monkeypatch.setattr(sys, "argv", ["own_lora.py", json.dumps(asked)])
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    runpy.run_path(str(PROGRAM))["main"]()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert taken == [(step, packed, 2 * 7 * 2, True) for step in (1, 2, 3)]
    assert len(found["seconds"]) == 2
    assert found["whole"] > found["peak"] > 0
