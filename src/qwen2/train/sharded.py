"""Checkpoints of several ranks: each writes its own shards, and any number of ranks, one too, reads them.

torch.distributed.checkpoint does it, over safetensors files whose headers say which part of which tensor they hold: nothing is pickled,
and the one reader takes what a single process wrote (tensors.py) as well. What is left out: writing while training goes on.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

SHARDS = "shard-*.safetensors"


def own_files(rank: int) -> str:
    """The pattern of the files that this rank writes; they are counted from 1."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's part of all tensors; every rank has to call it. OSError where it cannot be written."""
    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        rank, cause = first_failure(error)
        number = cause.errno if isinstance(cause, OSError) and cause.errno is not None else errno.EIO
        raise OSError(number, f"rank {rank}: {cause}", str(folder)) from None


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of each tensor in place. ValueError where a name is not there or has another shape."""
    reader = HuggingFaceStorageReader(str(folder))
    found: dict[str, Any] = reader.read_metadata().state_dict_metadata
    missing = [name for name in tensors if name not in found]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors of this run are not there, the first is {min(missing)}")
    for name, tensor in tensors.items():
        if found[name].size != tensor.shape:
            raise ValueError(f"{folder}: {name} has shape {list(found[name].size)}, this run's has {list(tensor.shape)}")
    try:
        with warnings.catch_warnings():  # that one process reads alone is not worth a warning
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        rank, cause = first_failure(error)
        raise ValueError(f"{folder}: rank {rank} cannot read it: {cause}") from None


def first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    """The lowest rank that failed, and why."""
    rank = min(error.failures)
    return rank, error.failures[rank][0]
