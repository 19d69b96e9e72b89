"""Plans: counts against the model's own, traffic against rings walked step by step, the document against the code, bad input."""

from __future__ import annotations

import json
import re
import runpy
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2.cli.app import main
from qwen2.cli.plan import shape_flag
from qwen2.config import FAMILY
from qwen2.config.family import tiny
from qwen2.train.hardware import GIB, GPUS, Group
from qwen2.train.layout import Layout
from qwen2.train.plan import Job, Plan, best, layouts, plans
from tests.train.conftest import write_shards

SCALE = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "scale.py"))
H100 = GPUS["h100"]


def job(name: str = "72b", gpus: int = 64, **changes: object) -> Job:
    return Job(FAMILY[f"qwen2:{name}"].config, gpus, H100, **changes)  # type: ignore[arg-type]


def ring(size: int, stride: int, node: int, nbytes: float) -> tuple[float, float]:
    """An all-gather as a ring over groups that lie side by side: what one rank receives, and one rank's share of what its node takes in."""
    members = [place * stride for place in range(size)]
    received: Counter[int] = Counter()
    into_node: Counter[int] = Counter()
    for _ in range(size - 1):
        for sender, receiver in zip(members, members[1:] + members[:1], strict=True):
            received[receiver] += nbytes / size
            into_node[receiver // node] += nbytes / size * (sender // node != receiver // node)
    share = Counter(member // node for member in members)
    return received[0], max(into_node[one] / share[one] for one in share)


@pytest.mark.parametrize(("size", "stride", "node"), [(8, 1, 8), (16, 1, 8), (8, 8, 8), (64, 2, 8), (4, 4, 8), (8, 1, 6), (7, 1, 6)])
def test_gathering_moves_what_a_ring_moves(size: int, stride: int, node: int) -> None:
    found = Group(size, stride, node).gather(1e9, H100)
    received, entered = ring(size, stride, node, 1e9)
    assert found.network == pytest.approx(entered)
    assert found.link == pytest.approx(received if node // stride > 1 else 0)


@pytest.mark.parametrize("name", ["0.5b", "57b-a14b", "72b"])
def test_states_and_layers_are_the_models_parameters(name: str) -> None:
    config = FAMILY[f"qwen2:{name}"].config
    plan = Plan(job(name, 1), Layout(), 1, False)
    assert plan.weights + plan.gradients + plan.optimizer == 16 * config.parameters()
    counted = config.layers * (plan.dense + plan.experts) + plan.outer + config.hidden
    assert counted == pytest.approx(config.parameters(), rel=1e-12)
    parts = Plan(job(name, 64), Layout(data=16, tensor=2, expert=2 if config.moe else 1, context=1 if config.moe else 2), 1, False)
    assert parts.weights == config.parameters() * 4 / 64


def test_every_layout_uses_all_gpus_and_suits_the_model() -> None:
    for name, gpus in (("0.5b", 8), ("57b-a14b", 64), ("72b", 1024)):
        found = list(layouts(job(name, gpus)))
        assert len(set(found)) == len(found)
        for layout in found:
            assert layout.ranks == gpus
            layout.check(FAMILY[f"qwen2:{name}"].config)


def test_the_best_fits_and_nothing_that_fits_is_faster() -> None:
    found = plans(job(memory=80 * GIB))
    taken = best(found)
    assert taken is not None
    assert taken.memory <= 80 * GIB
    assert taken.step == min(plan.step for plan in found if plan.memory <= 80 * GIB)
    roomier = best(plans(job(memory=140 * GIB)))
    assert roomier is not None
    assert roomier.step <= taken.step, "more memory never costs time"
    assert best(plans(job(gpus=8))) is None, "1,163 GB of weights, gradients and moments do not fit 8 x 80"


def test_splitting_rows_divides_memory_but_not_the_gathered_inputs() -> None:
    whole, shared = (Plan(job(), layout, 1, False) for layout in (Layout(data=64), Layout(data=8, tensor=8)))
    assert whole.rows == 8 * shared.rows
    hidden = FAMILY["qwen2:72b"].config.hidden
    assert shared.kept_by_layer - whole.kept_by_layer == 4 * hidden * 7
    assert Plan(job(), Layout(data=64), 1, True).activations < whole.activations / 10


def test_recomputation_costs_a_forward_pass() -> None:
    quick, slow = (Plan(job("7b", 8), Layout(data=8), 1, recompute) for recompute in (False, True))
    assert slow.step - quick.step == pytest.approx(quick.micro_batches * quick.job.config.layers * quick.computing[0])
    assert slow.utilisation < quick.utilisation


def test_the_document_is_what_the_code_counts() -> None:
    text = SCALE["DOCUMENT"].read_text(encoding="utf-8")
    assert SCALE["filled"](text) == text, "docs/scale.md: run python bench/scale.py"


def test_published_runs_are_met() -> None:
    sizes = [abs(deviation) for deviation in SCALE["deviations"]()]
    assert statistics.median(sizes) < 0.1
    assert max(sizes) < 0.35
    thirds = [-1 < deviation < 0 for deviation in SCALE["deviations"]()]
    assert 0.2 < sum(thirds) / len(thirds) < 0.8, "neither all too fast nor all too slow"


def test_the_command_names_the_layout_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen2:72b", "--gpus", "64", "--memory", "80GiB"]) == 0
    out = capsys.readouterr().out
    assert "take data 64" in out
    assert "on each of the 8 nodes" in out
    start = "torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST:29500 -m qwen2 pretrain SHARDS --out RUN"
    assert f"{start} --size 72b --device cuda" in out
    assert "--data-parallel 64 --context-parallel 1 --expert-parallel 1 --tensor-parallel 1" in out
    shape = re.search(r"--length 4096 --batch 1024 --micro-batch (\d+) --recompute (none|layers)$", out.strip())
    again = ", layers recomputed" if shape and shape[2] == "layers" else ""
    assert shape, out
    assert f"{shape[1]} sequences at a time{again}:" in out
    assert main(["plan", "Qwen/Qwen2-72B-Instruct", "--gpus", "8"]) == 1
    assert "none fits: give more GPUs than 8" in capsys.readouterr().out
    assert main(["plan", "qwen2:7b", "--gpus", "8", "--json"]) == 0
    assert any(one["fits"] for one in json.loads(capsys.readouterr().out)["layouts"])
    assert main(["plan", "Qwen/Qwen2-72B-Instruct", "--gpus", "8", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["layouts"]
    assert not any(one["fits"] for one in found)
    assert found[0]["memory"]["all"] == min(one["memory"]["all"] for one in found)


@pytest.mark.parametrize(
    ("words", "line", "reasons"),
    [
        (["qwen2:0.5b", "--gpus", "8", "--sequence", "2048"], None, set()),
        (
            ["qwen2:57b-a14b", "--gpus", "64"],
            "a mixture of experts (a published one took 2 times as long as is counted)",
            {"a mixture of experts"},
        ),
        (["qwen2:7b", "--gpus", "64", "--sequence", "32768"], "context ranks (published ones of one node took 1.1 times as long)", set()),
    ],
)
def test_what_no_published_run_bears_out_is_said(
    words: list[str], line: str | None, reasons: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 0
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("unverified, and on the fast side: layouts with ")]
    assert len(said) == (line is not None)
    assert line is None or line in said[0]
    assert main(["plan", *words, "--json"]) == 0
    for one in json.loads(capsys.readouterr().out)["layouts"]:
        wanted = reasons | ({"expert ranks"} if one["expert"] > 1 else set()) | ({"context ranks"} if one["context"] > 1 else set())
        assert set(one["unverified"]) == wanted


def test_a_config_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_hf()))
    assert main(["plan", str(tmp_path), "--gpus", "2", "--sequence", "512", "--batch-tokens", "8Ki"]) == 0
    out = capsys.readouterr().out
    assert "2 GPUs" in out
    command = out[out.index("torchrun") :].replace("\\\n", " ").split()
    assert command[:5] == ["torchrun", "--nproc-per-node", "2", "-m", "qwen2"]
    shards = write_shards(tmp_path / "shards")
    words = [{"SHARDS": str(shards), "RUN": str(tmp_path / "run")}.get(word, word) for word in command[5:]]
    assert main([*words]) == 1
    assert "--device cuda: torch finds no such device here" in capsys.readouterr().err, "a command line that is read to its end"


def test_a_config_that_is_none_is_named_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    for model in (tmp_path, tmp_path / "config.json"):
        assert main(["plan", str(model), "--gpus", "2"]) == 1
        assert capsys.readouterr().err.startswith(f"qwen2: {tmp_path / 'config.json'}: model_type None is not one")


def test_what_names_a_models_shape(tmp_path: Path) -> None:
    assert shape_flag("qwen2:57b-a14b-base") == "--size 57b-a14b"
    assert shape_flag("Qwen/Qwen2-0.5B") == "--size 0.5b"
    assert shape_flag("my models/config.json") == "--config 'my models/config.json'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qwen2:7b", "--gpus", "8", "--gpu", "b100"], "GPU 'b100' is not known: a100, h100, h200"),
        (["qwen2:7b", "--gpus", "8", "--memory", "lots"], "--memory lots: write a whole number above 0"),
        (
            ["qwen2:0.5b", "--gpus", "8", "--memory", "800GiB"],
            "--memory 800GiB: h100 has 80 GiB; give at most that, or another --gpu: a100 80 GiB, h100 80 GiB, h200 131.3 GiB",
        ),
        (["qwen2:7b", "--gpus", "8", "--batch-tokens", "0"], "--batch-tokens 0: write a whole number above 0"),
        (["qwen2:7b", "--gpus", "0"], "gpus 0: must be at least 1"),
        (["qwen2:7b", "--gpus", "12"], "12 GPUs on nodes of 8: must be whole nodes"),
        (["qwen2:7b", "--gpus", "8", "--sequence", "65536"], "sequences of 65,536 tokens: the model is made for 32,768"),
        (["qwen2:7b", "--gpus", "8", "--sequence", "4000"], "must be whole sequences of 4,000"),
        (
            ["qwen2:0.5b", "--gpus", "1024", "--batch-tokens", "64Ki"],
            "all layouts have a multiple of 256 that read different ones; take --batch-tokens 1048576 (256 sequences of 4,096)",
        ),
        (
            ["qwen2:0.5b", "--gpus", "3"],
            "1,024 sequences a step cannot be divided over 3 GPUs: all layouts have a multiple of 3 that read different ones; "
            "take --batch-tokens 4190208 (1,023 sequences of 4,096)",
        ),
        (["llama:7b", "--gpus", "8"], "llama:7b: no published model of that name has a plan"),
    ],
)
def test_what_cannot_be_planned_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 1
    assert message in capsys.readouterr().err


def test_layouts_that_a_model_does_not_allow() -> None:
    seven = FAMILY["qwen2:7b"].config
    with pytest.raises(ValueError, match="tensor-parallel 8: must divide the model's 4 key-value heads: 1 or 2 or 4"):
        Layout(tensor=8).check(seven)
    with pytest.raises(ValueError, match="expert-parallel 2: the model has no experts"):
        Layout(expert=2).check(seven)
    with pytest.raises(ValueError, match="expert-parallel 3 x tensor-parallel 1: must divide the model's 64 experts"):
        Layout(expert=3).check(FAMILY["qwen2:57b-a14b"].config)
    with pytest.raises(ValueError, match="tensor-parallel 2: must divide the feed-forward width 129"):
        Layout(tensor=2).check(replace(tiny(), ffn=129))
    with pytest.raises(ValueError, match="data-parallel 0: must be at least 1"):
        Layout(data=0)
