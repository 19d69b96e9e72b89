"""Two processes on a CPU (gloo) give what one gives, for each kind of parallelism; checkpoints go from any to any; one is killed;
one has numbers that are not finite. Four processes give the same with two kinds at once.

The processes are torchrun's, as users start them; one pair runs all that can be run one after another (two_ranks.py).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2.cli.app import main
from qwen2.config import MoEConfig
from qwen2.config.family import tiny
from qwen2.train.layout import Layout
from qwen2.train.parallel import Piece, pieces_of, rows_of
from qwen2.train.sharded import read_shards
from tests.train.conftest import write_shards

pytestmark = pytest.mark.xdist_group("two ranks")  # one process: what the fixtures run is most of the time

SCRIPT = Path(__file__).with_name("two_ranks.py")
MIXTURE = MoEConfig(experts=4, active=2, expert_ffn=32, shared_ffn=64)
ALIKE = ("--batch", "4", "--length", "48", "--log-every", "1", "--save-every", "2", "--lr", "0.01", "--schedule", "constant")
ALIKE += ("--eps", "1e-6")  # else AdamW's first steps have the sign of rounding where a gradient is next to nothing
ALIKE += ("--z-loss", "0.001", "--no-measure", "--no-tensorboard", "--precision", "float32")
AVERAGED = ("--average", "ema", "--ema-decay", "0.5")
KINDS = {  # run: what two processes are asked for beside the model
    "averaged-data": AVERAGED,
    "plain-accumulated": ("--recompute", "layers"),
    "plain-tensor": ("--tensor-parallel", "2"),
    "plain-context": ("--context-parallel", "2"),
    "tied-tensor": ("--tensor-parallel", "2"),
    "mixture-expert": ("--expert-parallel", "2"),
    "mixture-tensor": ("--tensor-parallel", "2", "--recompute", "layers"),
    "mixture-context": ("--context-parallel", "2"),
}
STARTED = {"data": (), "tensor": ("--tensor-parallel", "2")}  # layouts of stages that start from a model
ODD = {"plain-odd": ("--tensor-parallel", "2"), "plain-odd-context": ("--context-parallel", "2"), "plain-odd-data": ()}
RESUMED = {  # run: whose first steps it has, and how two processes go on with it
    "plain-one-to-two": ("plain", ("--tensor-parallel", "2")),
    "plain-one-to-shared": ("plain", ("--context-parallel", "2")),
}


def line(root: Path, run: str, *more: str) -> list[str]:
    kind = run.partition("-")[0]
    config = root / f"{kind if kind in ('tied', 'mixture') else 'plain'}.json"
    micro = "1" if "accumulated" in run else "2"
    words = ["pretrain", str(root / "shards"), "--out", str(root / run), "--config", str(config), "--micro-batch", micro]
    steps = () if "--steps" in more else ("--steps", "4")
    return [*words, *steps, *ALIKE, *more]


def from_line(root: Path, run: str, *more: str, start: str = "model") -> list[str]:
    """A stage of two steps that starts from the model of the plain run, or from its checkpoint."""
    words = ["pretrain", str(root / "shards"), "--out", str(root / run), "--from", str(root / "plain" / start), "--micro-batch", "2"]
    return [*words, "--steps", "2", *ALIKE, *more]


def torchrun(
    lines: Sequence[Sequence[str]], file: Path, *more: str, seconds: float = 0.1, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """Run command lines on some processes, which torchrun looks after every so many seconds, and ends when it misses one."""
    file.write_text(json.dumps(lines))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", port]
    words += ["--monitor-interval", str(seconds)]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    return subprocess.run(
        [sys.executable, *words, str(SCRIPT), str(file), *more], env=surroundings, capture_output=True, text=True, timeout=300, check=False
    )


def logged(run: Path) -> list[tuple[float, ...]]:
    """Loss and norm of every step, and what it evaluated to."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [(one["loss"], one["grad_norm"]) if "loss" in one else tuple(one["eval"].values()) for one in lines]


def steps(run: Path) -> list[tuple[float, ...]]:
    """Loss and norm of every step alone."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [(one["loss"], one["grad_norm"]) for one in lines if "loss" in one]


def go_on(root: Path, run: str, begun: str, steps: int = 6) -> None:
    """A run that has the first steps of another, as if it had been started for more."""
    shutil.copytree(root / begun, root / run)
    config = json.loads((root / run / "config.json").read_text())
    config["settings"]["steps"] = steps
    (root / run / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of all."""
    root = tmp_path_factory.mktemp("ranks")
    write_shards(root / "shards")
    for name, config in (("plain", tiny()), ("tied", tiny(tied=True)), ("mixture", tiny(moe=MIXTURE))):
        (root / f"{name}.json").write_text(json.dumps(config.to_hf()))
        assert main(line(root, name)) == 0
    assert main(line(root, "averaged", *AVERAGED)) == 0
    assert main(line(root, "plain-long", "--steps", "6")) == 0
    assert main(from_line(root, "from")) == 0
    return root


@pytest.fixture(scope="module")
def killed(alone: Path) -> subprocess.CompletedProcess[str]:
    """A run of two whose second process is killed before its fourth step."""
    return torchrun([line(alone, "mixture-killed", "--expert-parallel", "2")], alone / "killed.json", "3", seconds=5)


@pytest.fixture(scope="module")
def root(alone: Path, killed: subprocess.CompletedProcess[str]) -> Path:
    """Every kind on two processes, and runs that two processes go on with."""
    lines = [line(alone, run, *flags) for run, flags in KINDS.items()]
    for run, (begun, flags) in RESUMED.items():
        go_on(alone, run, begun)
        lines.append(line(alone, run, *flags, "--resume", "--steps", "6"))
    lines.append(line(alone, "mixture-killed", "--expert-parallel", "2", "--resume"))
    lines += [from_line(alone, f"plain-from-{layout}", *flags) for layout, flags in STARTED.items()]
    lines.append(from_line(alone, "plain-from-checkpoint", start="checkpoints/step-000004"))
    for run, flags in ODD.items():
        lines.append([word.replace("48", "47") for word in line(alone, run, "--steps", "2", *flags)])
    done = torchrun(lines, alone / "lines.json")
    assert done.returncode == 0, done.stderr[-4000:]
    (alone / "said.txt").write_text(done.stderr)
    return alone


@pytest.mark.parametrize("run", KINDS)
def test_two_processes_lose_what_one_loses(run: str, root: Path) -> None:
    alone, shared = logged(root / run.partition("-")[0]), logged(root / run)
    assert len(shared) == len(alone) == 4 + 2
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5), f"{run}: loss, norm and bits per byte step by step"


def test_nothing_is_said_that_no_user_can_mend(root: Path) -> None:
    """torch's remarks about its own ways of sharing."""
    text = (root / "said.txt").read_text()
    assert "Warning" not in text
    assert "While redistributing" not in text


def test_one_process_of_torchrun_is_a_layout_too(alone: Path) -> None:
    done = torchrun([line(alone, "plain-rank")], alone / "rank.json", processes=1)
    assert done.returncode == 0, done.stderr[-4000:]
    for ours, theirs in zip(logged(alone / "plain-rank"), logged(alone / "plain"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    whole, ranks = (load_file(alone / name / "model" / "model.safetensors") for name in ("plain", "plain-rank"))
    assert {name: tensor.shape for name, tensor in whole.items()} == {name: tensor.shape for name, tensor in ranks.items()}


def test_a_stage_starts_from_a_model_of_which_each_process_reads_its_part(root: Path) -> None:
    for run in ("plain-from-checkpoint", *(f"plain-from-{layout}" for layout in STARTED)):
        for ours, theirs in zip(logged(root / run), logged(root / "from"), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5), run


@pytest.fixture(scope="module")
def spoiled(alone: Path) -> subprocess.CompletedProcess[str]:
    """Runs in which the second process alone has numbers that are not finite in the third step."""
    skip = ("--on-nonfinite", "skip", "--most-skips", "1")
    lines = [line(alone, f"plain-{what}{more}", *flags) for what in ("weight", "loss") for more, flags in (("", ()), ("-skip", skip))]
    return torchrun(lines, alone / "spoiled.json", "spoil")


def events(run: Path) -> list[tuple[int, str, str]]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [(one["step"], one["event"], one["text"]) for one in lines if "event" in one]


def test_what_is_not_finite_on_one_rank_is_found_by_all(spoiled: subprocess.CompletedProcess[str], alone: Path) -> None:
    """The reason is the true one, in the run's metrics and from the main rank; all stop, or all go on without the batch."""
    assert spoiled.returncode == 0, spoiled.stderr[-4000:]
    weight = "1 of 1 is not finite: weights that are not finite: model.layers.1.mlp.up_proj.weight on rank 1"
    loss = "1 of 1 on rank 1 is not finite: weights and outputs of all layers are finite: it is the loss itself"
    found = {name: [(at, event, text.partition("micro-batch ")[2]) for at, event, text in events(alone / name)]
             for name in ("plain-weight", "plain-weight-skip", "plain-loss", "plain-loss-skip")}  # fmt: skip
    assert found["plain-weight"] == [(2, "stopped", weight)]
    assert found["plain-weight-skip"] == [(2, "left out", f"{weight}; its batches are left out, 1 so far"), (3, "stopped", weight)]
    assert found["plain-loss"] == [(2, "stopped", loss)]
    assert found["plain-loss-skip"] == [(2, "left out", f"{loss}; its batches are left out, 1 so far")]
    assert [name for name in found if (alone / name / "model").exists()] == ["plain-loss-skip"]
    assert spoiled.stderr.count(f"qwen2: step 3: the loss of micro-batch {weight}") == 2, "each process ends with the same line"
    assert "another process of this run is gone" not in spoiled.stderr


@pytest.mark.parametrize("run", ["averaged-data", "plain-tensor", "mixture-expert"])
def test_the_exported_model_is_whole(run: str, root: Path) -> None:
    alone, shared = (load_file(root / name / "model" / "model.safetensors") for name in (run.partition("-")[0], run))
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        assert torch.allclose(tensor, shared[name], atol=2e-3), name  # AdamW's first steps have the sign of rounding


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that one process wrote."""
    return load_file(folder / "tensors-0000.safetensors")


@pytest.mark.parametrize("run", ["averaged-data", "plain-tensor", "mixture-expert"])
def test_shards_are_read_by_one_process(run: str, root: Path) -> None:
    """Every weight, moment and average in its place, from files of two ranks."""
    files = sorted(path.name for path in (root / run / "checkpoints" / "step-000004").iterdir())
    assert [name.partition("-model")[0] for name in files] == ["shard-00001", "shard-00002", "state.json"]
    wanted = saved(root / run.partition("-")[0] / "checkpoints" / "step-000004")
    found = {name: torch.full_like(tensor, float("nan")) for name, tensor in wanted.items()}
    read_shards(root / run / "checkpoints" / "step-000004", found)
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=2e-3), name


@pytest.mark.parametrize("run", ["averaged-data", "mixture-expert"])
def test_a_checkpoint_of_several_ranks_exports(run: str, root: Path, tmp_path: Path) -> None:
    """The last step's checkpoint is the model that the run exported."""
    assert main(["export", str(root / run / "checkpoints" / "step-000004"), str(tmp_path / "out")]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", root / run / "model"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_tokens_are_counted_once_whatever_a_row_is_filled_up_to(root: Path) -> None:
    """Rows of 47 tokens over two tensor or context ranks are computed with a few more; two steps of four rows are 376."""
    for run in ("plain-odd", "plain-odd-context", "plain-odd-data"):
        lines = [json.loads(text) for text in (root / run / "metrics.jsonl").read_text().splitlines()]
        assert [line["tokens"] for line in lines if "loss" in line] == [188, 376], run


def test_shards_that_do_not_fit_are_named(root: Path) -> None:
    folder = root / "plain-tensor" / "checkpoints" / "step-000004"
    with pytest.raises(ValueError, match="1 tensors of this run are not there, the first is model/lost"):
        read_shards(folder, {"model/lost": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"model/model.norm.weight has shape \[64\], this run's has \[3\]"):
        read_shards(folder, {"model/model.norm.weight": torch.zeros(3)})


def test_a_run_goes_on_with_another_number_of_processes(root: Path) -> None:
    """Two begin and one goes on; one begins and two go on, as tensor and as context ranks: as one that did it all."""
    go_on(root, "plain-two-to-one", "plain-tensor")
    assert main(line(root, "plain-two-to-one", "--resume", "--steps", "6")) == 0
    wanted = steps(root / "plain-long")[-2:]
    for run in ("plain-two-to-one", *RESUMED):
        for ours, theirs in zip(steps(root / run)[-2:], wanted, strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5), run


def test_a_killed_process_ends_the_run_and_it_resumes_exactly(killed: subprocess.CompletedProcess[str], root: Path) -> None:
    assert killed.returncode != 0
    assert "another process of this run is gone, so this one ends; start all of them again with --resume" in killed.stderr, killed.stderr[
        -3000:
    ]
    assert len(steps(root / "mixture-killed")) == 4
    assert steps(root / "mixture-killed")[-2:] == steps(root / "mixture-expert")[-2:], "bit by bit"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tensor-parallel", "2"],
            "tensor 2 takes 2 processes, and there is 1: torchrun --nproc-per-node 2 -m qwen2 pretrain ... starts them",
        ),
        (["--data-parallel", "4", "--context-parallel", "2"], "data 4 x context 2 takes 8 processes, and there is 1"),
        (["--expert-parallel", "0"], "expert-parallel 0: must be at least 1"),
    ],
)
def test_processes_that_are_not_there(flags: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line(root, "plain-refused", *flags)) == 1
    assert message in capsys.readouterr().err


def test_a_context_rank_looks_at_what_one_process_looks_at() -> None:
    """Each piece of the rows against the whole, for sequences that begin and end anywhere."""
    from qwen2.model.attention import causal_attention

    generator = torch.Generator().manual_seed(3)
    for lengths in ((48,), (5, 30, 1, 12), (24, 24), (47, 1), (1, 47), (12, 12, 12, 12)):
        q, k, v = (torch.randn(48, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
        whole = causal_attention(q, k, v, lengths)
        for rank in range(3):
            for start, stop in pieces_of(rank, 3, 48):
                torch.testing.assert_close(Piece(start, stop, lengths, q.device)(q[start:stop], k, v), whole[start:stop])
    assert sorted(torch.cat([rows_of(rank, 3, 48) for rank in range(3)]).tolist()) == list(range(48))


BOTH = {  # two kinds of parallelism at once, on four processes
    "plain-data-tensor": ("--data-parallel", "2", "--tensor-parallel", "2"),
    "plain-context-tensor": ("--context-parallel", "2", "--tensor-parallel", "2"),
    "mixture-expert-tensor": ("--expert-parallel", "2", "--tensor-parallel", "2"),
}


@pytest.mark.slow
def test_two_kinds_at_once_lose_what_one_process_loses(alone: Path) -> None:
    done = torchrun([line(alone, run, *flags) for run, flags in BOTH.items()], alone / "four.json", processes=4)
    assert done.returncode == 0, done.stderr[-4000:]
    for run in BOTH:
        for ours, theirs in zip(logged(alone / run), logged(alone / run.partition("-")[0]), strict=True):
            assert ours[0] == pytest.approx(theirs[0], abs=1e-5), f"{run}: loss step by step"
            assert ours[1:] == pytest.approx(theirs[1:], abs=1e-5, rel=3e-6), f"{run}: norms of 7, of float32 sums over four processes"


def test_context_ranks_have_as_much_to_look_at() -> None:
    for ranks in (2, 4, 8):
        keys = [sum(row + 1 for row in rows_of(rank, ranks, 64 * ranks).tolist()) for rank in range(ranks)]
        assert len(set(keys)) == 1
    assert Layout(context=4, tensor=2).row_unit == 16
