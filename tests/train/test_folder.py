"""A run's folder: who holds it, what a run that is resumed has to be, and what of it may change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen2.train.changes import falling, rising, with_end
from qwen2.train.folder import RunFolder
from qwen2.train.optim import rate_share
from tests.train.conftest import run


def test_two_runs_in_one_folder_are_refused(tmp_path: Path):
    with RunFolder(tmp_path / "run"):
        program = f"from pathlib import Path; from qwen2.train.folder import RunFolder; RunFolder(Path({str(tmp_path / 'run')!r}))"
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "another run is training in this folder" in other.stderr
    RunFolder(tmp_path / "run").close()  # free again


def test_a_run_is_what_it_was_started_as(tmp_path: Path):
    first = {"settings": {"beta1": 0.9, "log_every": 10}, "model": {"hidden_size": 64}}
    with RunFolder(tmp_path / "run") as folder:
        with pytest.raises(FileNotFoundError, match="no run to resume"):
            folder.begin(first, resume=True)
        folder.begin(first, resume=False)
        with pytest.raises(FileExistsError, match="holds a run already; go on with it by --resume"):
            folder.begin(first, resume=False)
        assert folder.begin({**first, "settings": {"beta1": 0.9, "log_every": 1}}, resume=True) == []
        with pytest.raises(ValueError, match=r"settings: beta1 is 0.9 in the run, 0.8 here; .*start another run from it: --from"):
            folder.begin({**first, "settings": {"beta1": 0.8, "log_every": 10}}, resume=True)
        with pytest.raises(ValueError, match="model: hidden_size is 64 in the run, 128 here"):
            folder.begin({**first, "model": {"hidden_size": 128}}, resume=True)
        assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"] == {"beta1": 0.9, "log_every": 1}


def wsd(**changes: Any) -> dict[str, Any]:
    return {"steps": 100, "schedule": "wsd", "warmup": 0.1, "decay": 0.2, "lr": 0.1, **changes}


def test_a_new_run_is_not_begun_among_another_ones_checkpoints(tmp_path: Path):
    """They would count as its own: its first one would go as older than theirs."""
    run(tmp_path / "run", steps=6)
    with (
        RunFolder(tmp_path / "run") as folder,
        pytest.raises(FileExistsError, match=r"checkpoints of a run whose config\.json is gone; remove them, or name another folder"),
    ):
        folder.begin({"settings": {}}, resume=False)


def test_what_may_change_is_said(tmp_path: Path):
    """Each kind of setting: those that say nothing, those that change numbers, the end; and the run remembers it."""
    with RunFolder(tmp_path / "run") as folder:
        folder.begin({"settings": wsd(micro_batch=8, recompute="none", on_nonfinite="stop")}, resume=False)
        now = wsd(micro_batch=2, recompute="layers", on_nonfinite="skip", lr=0.05)
        lines = folder.begin({"settings": now}, resume=True)
        assert [line.partition(":")[0] for line in lines] == [
            "lr was 0.1 and is 0.05", "micro_batch was 8 and is 2", "recompute was none and is layers",
        ]  # fmt: skip
        assert folder.begin({"settings": now}, resume=True) == []


@pytest.mark.parametrize(
    ("schedule", "steps", "done", "found"),
    [
        ("wsd", 200, 50, {"warmup": 0.05, "decay": 0.2}),  # the warm-up stays ten steps
        ("wsd", 60, 55, {"warmup": 1 / 6, "decay": 5 / 60}),  # and the fall is what is left
        ("wsd", 200, 5, {"warmup": 0.1, "decay": 0.2}),
        ("constant", 400, 100, {"warmup": 0.025, "decay": 0.2}),
        ("wsd", 200, 81, "the rate began to fall after step 80, 81 are done"),
        ("wsd", 40, 50, "50 are done already"),
        ("cosine", 200, 50, "under cosine the 50 steps that are done would have had other rates"),
    ],
)
def test_the_end_may_be_moved_where_no_step_done_would_have_been_another(schedule: str, steps: int, done: int, found: Any):
    written = wsd(schedule=schedule)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            with_end(written, steps, done)
        return
    moved = with_end(written, steps, done)
    assert moved == {**written, "steps": steps, **{name: pytest.approx(value) for name, value in found.items()}}
    rates = [[rate_share(schedule, step, s["steps"], rising(s), falling(s), 0.0) for step in range(done)] for s in (written, moved)]
    assert done == 5 or rates[0] == rates[1]
    assert with_end(moved, steps, done) == moved


def test_a_run_s_folder_is_no_file(tmp_path: Path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="run: is a file, and a run is a folder; name another with --out"):
        RunFolder(tmp_path / "run")
