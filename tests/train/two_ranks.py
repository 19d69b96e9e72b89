"""What test_distributed.py runs on two processes, started by torchrun: command lines of `qwen2`, one after another in one pair.

    torchrun --nproc-per-node 2 tests/train/two_ranks.py LINES.json [STEP]

LINES.json holds a list of command lines. With STEP, rank 1 is killed when it begins that step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

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


if __name__ == "__main__":
    if len(sys.argv) > 2:
        die_at(int(sys.argv[2]))
    else:
        dist.init_process_group("gloo")  # once for all lines
    for line in json.loads(Path(sys.argv[1]).read_text()):
        code = main(line)
        if code:
            sys.exit(code)
