"""Fine-tuning and preference training on two processes (gloo) lose what they lose on one: weights and adapters, ends that are not even."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2.cli.app import main
from qwen2.train.metrics import read_lines
from tests.train.test_distributed import torchrun

pytestmark = pytest.mark.xdist_group("two ranks")  # one process: what the fixtures run is most of the time

ALIKE = ["--batch", "4", "--length", "96", "--log-every", "1", "--lr", "0.003", "--schedule", "constant", "--warmup", "0", "--eps", "1e-6"]
ALIKE += ["--no-measure", "--no-tensorboard", "--precision", "float32", "--eval-share", "0.2"]
LORA = ["--lora-rank", "4"]
RUNS = {  # run: verb, data and flags. 35 items or so, so that the last step of an epoch is not full
    "sft": ("sft", "chats", ["--micro-batch", "2", "--epochs", "1"]),
    "sft-adapters": ("sft", "chats", ["--micro-batch", "1", "--steps", "3", *LORA, "--lora-dropout", "0"]),
    "dpo": ("dpo", "pairs", ["--micro-batch", "1", "--epochs", "1", "--sft", "0.1"]),
    "dpo-adapters": ("dpo", "pairs", ["--micro-batch", "2", "--steps", "3", *LORA, "--reference", "adapter"]),
    "kto": ("dpo", "pairs", ["--micro-batch", "2", "--steps", "3", "--loss", "kto"]),
}


def line(root: Path, start: Path, run: str, out: str) -> list[str]:
    verb, data, flags = RUNS[run]
    return [verb, str(start), str(root / f"{data}.jsonl"), "--out", str(root / out), *ALIKE, *flags]


@pytest.fixture(scope="module")
def root(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("post-ranks")
    pairs = [{"prompt": f"the {i} lazy dog", "chosen": "a quick fox" + " fox" * (i % 4), "rejected": f"dog {i}"} for i in range(43)]
    chats = [{"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["chosen"]}]} for p in pairs]
    for name, rows in (("pairs", pairs), ("chats", chats)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for run in RUNS:
        assert main(line(root, tiny_folder, run, run)) == 0
    refused = [*line(root, tiny_folder, "dpo", "refused"), "--tensor-parallel", "2"]
    done = torchrun([line(root, tiny_folder, run, f"{run}-shared") for run in RUNS], root / "lines.json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("written after") == len(RUNS), "one process says so"
    done = torchrun([refused], root / "refused.json")
    assert "processes of dpo read different pairs each, and cannot share one" in done.stderr
    return root


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_lose_what_one_loses(run: str, root: Path) -> None:
    alone, shared = (read_lines(root / name / "metrics.jsonl") for name in (run, f"{run}-shared"))
    assert len(alone) == len(shared) > 4
    for ours, theirs in zip(shared, alone, strict=True):
        if "eval" in theirs:
            ours, theirs = ours["eval"], theirs["eval"]
        names = [name for name, value in theirs.items() if isinstance(value, int | float) and name not in ("tokens_per_s", "mfu")]
        names = [name for name in names if name in ours or not name.endswith("standard error")]
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5, rel=2e-5), f"{run}: {name} of {theirs}"


@pytest.mark.parametrize("run", RUNS)
def test_what_it_leaves_is_whole(run: str, root: Path) -> None:
    part = "adapter/adapter_model.safetensors" if "adapters" in run else "model/model.safetensors"
    alone, shared = (load_file(root / name / part) for name in (run, f"{run}-shared"))
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        assert torch.allclose(tensor, shared[name], atol=1e-3), name


def test_the_references_numbers_are_those_of_one_process(root: Path) -> None:
    alone, shared = (load_file(root / name / "reference.safetensors")["sums"] for name in ("dpo", "dpo-shared"))
    assert torch.equal(alone.isnan(), shared.isnan())
    torch.testing.assert_close(alone.nan_to_num(), shared.nan_to_num(), atol=1e-4, rtol=1e-5)
