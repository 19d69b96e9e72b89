"""Steps of our training loop on random tokens, one process a run: its speed and its memory, as JSON on the last line.

It is `Loop.step` as every job runs it (train/loop.py), with pre-training's loss: rows are packed, gradients checked and clipped, losses
watched for spikes, sums gathered, AdamW stepped at the schedule's rate. Left out: lines, checkpoints and evaluations between steps,
as in the peer's run.

Read by bench/train.py:  python own_step.py '{"config": {...}, "batch": 8, ...}'
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qwen2 import kernels
from qwen2.config import ModelConfig
from qwen2.data.batches import Batch, Row, pack
from qwen2.train.folder import RunFolder
from qwen2.train.loop import Loop
from qwen2.train.pretrain import flops_per_token, next_token_loss
from qwen2.train.stage import PretrainSettings
from qwen2.train.task import Task
from qwen2.train.world import World

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def fixed_task(config: ModelConfig, settings: PretrainSettings, world: World) -> Task[Batch]:
    """Rows of random tokens, a document each, as the shards' would come."""
    generator = torch.Generator().manual_seed(0)

    def next_step() -> list[Batch]:
        rows = []
        for ids in torch.randint(0, config.vocab, (settings.batch, settings.length), generator=generator).numpy():
            labels = ids.copy()
            labels[:-1], labels[-1] = ids[1:], -100
            rows.append(Row(ids, labels, (settings.length,)))
        return [pack(rows)]

    def nothing(state: Any) -> None:
        """There is no place to go on from."""

    loss = next_token_loss(settings.z_loss, settings.balance, world)
    parts = (lambda batch: batch.targets, lambda batch: len(batch.tokens), world.local)
    return Task(next_step, loss, *parts, dict, nothing, flops=flops_per_token(config))


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    kernels.select_isa(asked["isa"])
    before = resident()
    config, world = ModelConfig.from_hf(asked["config"]), World()
    settings = PretrainSettings(
        steps=asked["steps"] + asked["warmup"],
        batch=asked["batch"],
        micro_batch=asked["batch"],
        length=asked["length"],
        lr=3e-4,
        schedule="constant",
        warmup=0.0,
        precision=PRECISIONS[asked["precision"]],  # type: ignore[arg-type]
        balance=config.moe.aux_coef if config.moe else 0.0,
        measure=False,
        tensorboard=False,
    )
    ends = []
    with tempfile.TemporaryDirectory() as scratch, RunFolder(Path(scratch) / "run") as folder:
        network = world.new_network(config, 0, torch.float32)
        loop = Loop(network, fixed_task(config, settings, world), settings, folder, world)
        for _ in range(settings.steps):
            loop.step()
            ends.append(time.perf_counter())
    seconds = [b - a for a, b in zip(ends[asked["warmup"] - 1 :], ends[asked["warmup"] :], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(parameter.numel() for parameter in network.parameters())
    print(json.dumps({"seconds": seconds, "peak": peak - before, "weights": weights, "version": f"kernels for {kernels.isa()}"}))


if __name__ == "__main__":
    main()
