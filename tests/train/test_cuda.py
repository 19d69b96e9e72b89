"""Training on a GPU: the numbers of a CPU, bfloat16 beside float32, recomputed layers, resuming, and one rank of NCCL. Skipped without one.

The same runs for every case, of eight steps on small shards, whose lines of metrics are compared.

    python -m pytest tests/train/test_cuda.py                # on a machine with a GPU
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen2.cli.app import main
from qwen2.train.metrics import read_lines
from qwen2.weights.model import load
from tests.train.conftest import write_shards

DEVICE = "cuda"
STEPS = 8
SAME = [
    "--size",
    "tiny",
    "--length",
    "48",
    "--batch",
    "4",
    "--micro-batch",
    "2",
    "--lr",
    "0.003",
    "--schedule",
    "constant",
    "--eps",
    "1e-6",
]
QUIET = ["--log-every", "1", "--save-every", "3", "--no-tensorboard", "--no-measure"]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus") / "shards")


def words(shards: Path, out: Path, *more: str, device: str = DEVICE, precision: str = "float32", steps: int = STEPS) -> list[str]:
    place = ["pretrain", str(shards), "--out", str(out), "--device", device, "--precision", precision, "--steps", str(steps)]
    return [*place, *SAME, *QUIET, *more]


def numbers(out: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    found = [(line["loss"], line["grad_norm"]) for line in read_lines(out / "metrics.jsonl") if "loss" in line]
    assert len(found) == STEPS
    return found


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load(str(out / "model"), dtype="float32").network.named_parameters())


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on the GPU in float32, of one process, that the others are compared with."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(words(shards, out)) == 0
    return out


def close(ours: Path, theirs: Path, relative: float) -> None:
    for one, other in zip(numbers(ours), numbers(theirs), strict=True):
        assert one == pytest.approx(other, rel=relative)


def test_float32_has_the_numbers_of_a_cpu(whole: Path, shards: Path, tmp_path: Path) -> None:
    assert main(words(shards, tmp_path / "cpu", device="cpu")) == 0
    close(whole, tmp_path / "cpu", 1e-3)
    evals = [[line["eval"] for line in read_lines(out / "metrics.jsonl") if "eval" in line] for out in (whole, tmp_path / "cpu")]
    for one, other in zip(*evals, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_bfloat16_is_near_float32_and_not_the_same(whole: Path, shards: Path, tmp_path: Path) -> None:
    assert main(words(shards, tmp_path / "half", precision="bfloat16")) == 0
    close(tmp_path / "half", whole, 0.03)
    assert numbers(tmp_path / "half") != numbers(whole)
    assert {parameter.dtype for parameter in weights(tmp_path / "half").values()} == {torch.float32}


def test_recomputed_layers_change_no_number(whole: Path, shards: Path, tmp_path: Path) -> None:
    assert main(words(shards, tmp_path / "again", "--recompute", "layers")) == 0
    close(tmp_path / "again", whole, 1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_goes_on_from_its_checkpoint(precision: str, shards: Path, tmp_path: Path) -> None:
    assert main(words(shards, tmp_path / "whole", precision=precision)) == 0
    assert main(words(shards, tmp_path / "cut", steps=5, precision=precision)) == 0
    assert main(words(shards, tmp_path / "cut", "--resume", precision=precision)) == 0
    close(tmp_path / "cut", tmp_path / "whole", 1e-4)


@pytest.mark.parametrize(("precision", "more"), [("float32", ()), ("bfloat16", ()), ("float32", ("--recompute", "layers"))])
def test_one_rank_of_nccl_has_the_numbers_of_none(precision: str, more: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    """FSDP2 over one rank, started by torchrun, and its checkpoint read by a run without it."""
    given = words(shards, tmp_path / "rank", *more, precision=precision, steps=5)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "qwen2"]
    surroundings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([*start, *given], capture_output=True, text=True, timeout=300, check=False, env=surroundings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(words(shards, tmp_path / "rank", "--resume", *more, precision=precision)) == 0
    assert main(words(shards, tmp_path / "alone", *more, precision=precision)) == 0
    close(tmp_path / "rank", tmp_path / "alone", 0.03 if precision == "bfloat16" else 1e-3)
