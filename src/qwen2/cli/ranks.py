"""The flags that divide a run over processes, and how a run of several ends.

torchrun starts the processes; what it says of a failed one comes after the line that is said here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from qwen2.train.world import World

GONE = "another process of this run is gone, so this one ends; start all of them again with --resume to go on from the last checkpoint"
LOST = ("gloo", "Connection closed by peer", "Connection reset by peer")  # what a broken connection is told by


@dataclass(frozen=True)
class Ranks:
    """Processes of each kind; docs/scale.md says what each divides, `qwen2 plan` which to take."""

    data_parallel: Annotated[int | None, Parameter(help="Processes that read different rows; left out, all that are left.")] = None
    context_parallel: Annotated[int, Parameter(help="Processes that share the tokens of a row.")] = 1
    expert_parallel: Annotated[int, Parameter(help="Processes that the experts are spread over; they read different rows too.")] = 1
    tensor_parallel: Annotated[int, Parameter(help="Processes that share heads and feed-forward width.")] = 1


ONE = Ranks()


def first_here() -> bool:
    """Whether this is the only process of the run on this machine, or the first: the one that does what one has to do."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def ranks_here() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def say_idle_gpus(device: str) -> None:
    """Once a machine, a line where it has GPUs and the run takes none of them."""
    import torch

    if device == "cpu" and first_here() and (count := torch.cuda.device_count()):
        there = "1 GPU" if count == 1 else f"{count} GPUs"
        print(f"this machine has {there}, and the run computes on the CPU: --device cuda takes a GPU for each process", file=sys.stderr)


@contextmanager
def world_of(device: str, ranks: Ranks) -> Iterator[World]:
    """The processes of this run as one world. ConnectionError in one line where one of the others is gone."""
    import torch.distributed as dist

    from qwen2.train.distributed import open_world

    say_idle_gpus(device)
    try:
        world = open_world(device, ranks.data_parallel, ranks.context_parallel, ranks.expert_parallel, ranks.tensor_parallel)
        yield world
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST):
            raise ConnectionError(GONE) from error
        raise
    world.close()
