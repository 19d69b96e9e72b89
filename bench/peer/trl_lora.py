"""LoRA steps of trl's SFTTrainer with peft on random tokens, one process a run: speed and memory, as JSON on the last line.

With trl's own defaults (gradient checkpointing, its loss by chunks), or with `checkpointing` false, whichever is asked; SDPA, the fused
AdamW, no logging, no checkpoints, no evaluation. `dtype` is what the base's weights are kept in, `precision` what is computed in: bf16 is
trl's `bf16` (autocast). Rows come with ids and labels, so that no tokenizer runs. Seconds are taken between the ends of steps.

Read by bench/lora.py, in an interpreter that has trl and peft:  python trl_lora.py '{"config": {...}, "batch": 4, ...}'
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback


class Clock(TrainerCallback):  # type: ignore[misc]
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.ends.append(time.perf_counter())


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def no_tokenizer() -> PreTrainedTokenizerFast:
    """The trainer wants one; it is never asked for a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    backend = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    before = resident()
    torch.manual_seed(0)
    config = AutoConfig.for_model(**asked["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, asked["dtype"]))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    count = asked["batch"] * (asked["steps"] + asked["warmup"])
    ids = torch.randint(0, config.vocab_size, (count, asked["length"]), generator=torch.Generator().manual_seed(0)).tolist()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=asked["precision"] == "bf16",
            gradient_checkpointing=asked["checkpointing"],
            max_length=asked["length"],
            per_device_train_batch_size=asked["batch"],
            max_steps=asked["steps"] + asked["warmup"],
            optim="adamw_torch_fused",
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        lora = peft.LoraConfig(r=asked["rank"], lora_alpha=2 * asked["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = trl.SFTTrainer(
            model=model, args=arguments, train_dataset=data, peft_config=lora, processing_class=no_tokenizer(), callbacks=[clock]
        )
        trainer.train()
    seconds = [b - a for a, b in zip(clock.ends[asked["warmup"] - 1 :], clock.ends[asked["warmup"] :], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    version = f"trl {trl.__version__}, peft {peft.__version__}"
    print(json.dumps({"seconds": seconds, "peak": peak - before, "weights": weights, "version": version}))


if __name__ == "__main__":
    main()
