"""`runs/upcycle.sh --quick`: a dense parent and the mixture made from it, on the same further rows; and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2.train.metrics import read_lines
from tests.runs.conftest import recipe

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.xdist_group("recipes")]


def test_the_mixture_goes_on_from_its_parent_beside_it(quick_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = recipe("upcycle.sh", "--quick", quick_base, out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    runs = {name: json.loads((out / name / "config.json").read_text()) for name in ("parent", "dense", "mixture")}
    planned = json.loads((quick_base / "budget" / "config.json").read_text())
    assert runs["parent"]["model"]["hidden_size"] == planned["hidden_size"]
    assert runs["dense"]["model"] == runs["parent"]["model"]
    assert (runs["mixture"]["model"]["num_experts"], runs["mixture"]["model"]["num_experts_per_tok"]) == (16, 4)
    assert runs["dense"]["settings"] == runs["mixture"]["settings"]
    lines = {name: read_lines(out / name / "metrics.jsonl") for name in runs}
    last = {name: [line for line in found if "loss" in line][-1] for name, found in lines.items()}
    assert [(last[name]["step"], last[name]["tokens"]) for name in runs] == [(4, 4 * 4096), (3, 3 * 4096), (3, 3 * 4096)]
    before = {name: next(line["eval"] for line in found if "eval" in line) for name, found in lines.items()}
    parent = [line["eval"] for line in lines["parent"] if "eval" in line][-1]
    assert before["dense"] == pytest.approx(parent, rel=1e-3)
    assert before["mixture"] != before["dense"]
    stages = json.loads((out / "report.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["parent", "start", "dense", "mixture"]
    again = recipe("upcycle.sh", "--quick", quick_base, out)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("finished before") == 4
