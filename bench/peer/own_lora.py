"""LoRA steps of our training loop on random tokens, one process a run: its speed and its memory, as JSON on the last line.

It is `Loop.step` as every job runs it (own_step.py says what that is), with adapters on all linear layers: of new weights of a config,
or, with `file`, of a GGUF file's weights as they are packed.

Read by bench/lora.py:  python own_lora.py '{"config": {...}, "batch": 4, ...}'
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from own_step import PRECISIONS, fixed_task, resident

from qwen2 import kernels
from qwen2.config import ModelConfig
from qwen2.model.lora import LoraSettings, add_lora, lora_parameters
from qwen2.train.folder import RunFolder
from qwen2.train.loop import Loop
from qwen2.train.stage import PretrainSettings
from qwen2.train.world import World
from qwen2.weights.model import load


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    kernels.select_isa(asked["isa"])
    before = resident()
    world = World()
    packed = load(asked["file"], packed=True) if "file" in asked else None
    config = ModelConfig.from_hf(asked["config"]) if packed is None else packed.config
    settings = PretrainSettings(
        steps=asked["steps"] + asked["warmup"],
        batch=asked["batch"],
        micro_batch=asked["batch"],
        length=asked["length"],
        lr=2e-4,
        schedule="constant",
        warmup=0.0,
        precision=PRECISIONS[asked["precision"]],  # type: ignore[arg-type]
        recompute=asked["recompute"],
        measure=False,
        tensorboard=False,
    )
    ends = []
    with tempfile.TemporaryDirectory() as scratch, RunFolder(Path(scratch) / "run") as folder:
        network = world.new_network(config, 0, torch.float32) if packed is None else packed.network
        add_lora(network, LoraSettings(rank=asked["rank"], alpha=2 * asked["rank"]))
        loop = Loop(network, fixed_task(config, settings, world), settings, folder, world)
        for _ in range(settings.steps):
            loop.step()
            ends.append(time.perf_counter())
    seconds = [b - a for a, b in zip(ends[asked["warmup"] - 1 :], ends[asked["warmup"] :], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    learned = {parameter.data_ptr() for parameter in lora_parameters(network).values()}
    weights = sum(parameter.nbytes for parameter in network.parameters() if parameter.data_ptr() not in learned)
    found = {"seconds": seconds, "whole": peak, "peak": peak - before, "weights": weights, "version": f"kernels for {kernels.isa()}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
