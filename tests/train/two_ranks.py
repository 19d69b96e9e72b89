"""What test_distributed.py runs on two processes or four, started by torchrun: command lines of `qwen2`, one after another.

    torchrun --nproc-per-node 2 tests/train/two_ranks.py LINES.json [STEP | spoil]

LINES.json holds a list of command lines. With STEP, rank 1 is killed when it begins that step. With `spoil` numbers of rank 1 alone are
not finite at step 2: one of its own weights in a run whose name has "weight" in it, its loss where that has "loss".
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwen2.cli.app import main
from qwen2.train.loop import Loop


def die_at(step: int) -> None:
    """Rank 1 is gone, as by `kill -9`, when it begins a step."""
    begin = Loop.step

    def stepped(self: Loop[Any]) -> Any:
        if self.state.step == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(self)

    Loop.step = stepped  # type: ignore[method-assign]


def spoil() -> None:
    """Rank 1 meets numbers that are not finite, and no other rank has them where it looks."""
    begin = Loop.step

    def stepped(self: Loop[Any]) -> Any:
        whole = self.task
        if self.state.step == 2 and os.environ["RANK"] == "1":
            if "weight" in self.folder.path.name:
                parameter: Any = dict(self.network.named_parameters())["model.layers.1.mlp.up_proj.weight"]
                with torch.no_grad():
                    parameter.to_local()[0, 0] = float("nan")
            elif "loss" in self.folder.path.name:
                self.task = replace(whole, loss=lambda network, batch: nan_of(whole.loss(network, batch)))
        try:
            return begin(self)
        finally:
            self.task = whole

    Loop.step = stepped  # type: ignore[method-assign]


def nan_of(found: Any) -> Any:
    total, sums = found
    return total * float("nan"), sums


if __name__ == "__main__":
    faults = sys.argv[2:] == ["spoil"]
    if faults:
        spoil()
    if len(sys.argv) > 2 and not faults:
        die_at(int(sys.argv[2]))
    else:
        dist.init_process_group("gloo")  # once for all lines
    for line in json.loads(Path(sys.argv[1]).read_text()):
        code = main(line)
        if code and not faults:
            sys.exit(code)
