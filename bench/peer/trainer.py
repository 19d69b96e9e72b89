"""Steps of transformers' Trainer on random tokens, one process a run: its speed and its memory, as JSON on the last line.

The Trainer runs at its best on a CPU: SDPA, the fused AdamW, no logging, no checkpoints, no evaluation; bfloat16 is its own `bf16`
(autocast). Seconds are taken between the ends of steps. Left out: what is trained (train.py hands in config and shape).

Read by bench/train.py, in an interpreter that has transformers and accelerate:  python trainer.py '{"config": {...}, "batch": 8, ...}'
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):  # type: ignore[misc]
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.ends.append(time.perf_counter())


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    before = resident()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**asked["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    count = asked["batch"] * (asked["steps"] + asked["warmup"])
    ids = torch.randint(0, config.vocab_size, (count, asked["length"]), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=asked["precision"] == "bf16",
            per_device_train_batch_size=asked["batch"],
            max_steps=asked["steps"] + asked["warmup"],
            optim="adamw_torch_fused",
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
    seconds = [b - a for a, b in zip(clock.ends[asked["warmup"] - 1 :], clock.ends[asked["warmup"] :], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"seconds": seconds, "peak": peak - before, "weights": weights, "version": transformers.__version__}))


if __name__ == "__main__":
    main()
