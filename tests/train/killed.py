"""A small run of pre-training that a test may kill at any moment: imported by a fork server, so that it starts at once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # which the first optimizer step imports: once here instead of in every process

from qwen2.config import MoEConfig, tiny
from qwen2.data.shards import Shards
from qwen2.tokenizer import Tokenizer
from qwen2.train.pretrain import Job, pretrain
from qwen2.train.stage import PretrainSettings

MOE = tiny(moe=MoEConfig(8, 2, 32, 96))
SMALL = {"steps": 24, "length": 48, "batch": 4, "micro_batch": 3, "log_every": 1, "eval_every": 5, "save_every": 2, "keep": 3, "lr": 3e-3}
KINDS = {
    "dense-bfloat16": (tiny(), {"precision": "bfloat16"}),
    "moe-averaged": (MOE, {"average": "ema", "ema_decay": 0.9, "balance": 0.01, "precision": "float32"}),
}


def train(shards: str, out: str, kind: str) -> None:
    """Start the run in `out`, or go on with it; what it says goes into a file beside it."""
    said = os.open(f"{out}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    config, changes = KINDS[kind]
    opened = Shards.open(shards, verify=False)
    settings = PretrainSettings(**{**SMALL, "tensorboard": False, "measure": False, **changes})  # type: ignore[arg-type]
    model = replace(config, eos=(509,), bos=509, context=48)
    resume = (Path(out) / "config.json").exists()
    pretrain(Job(opened, Tokenizer.from_folder(opened.folder / "tokenizer"), model, settings, Path(out), resume=resume))
