"""Checkpoints and run folders: resuming bit for bit, what is damaged, what does not fit, locks."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.config import ModelConfig, MoEConfig, tiny
from qwen2.train import checkpoint
from qwen2.train.changes import falling, rising, with_end
from qwen2.train.checkpoint import newest, numbered
from qwen2.train.folder import RunFolder
from qwen2.train.metrics import read_lines
from qwen2.train.optim import rate_share
from qwen2.train.tensors import digests as digests_of
from qwen2.train.world import World
from tests.train.conftest import Toy, logged, run

MOE = tiny(moe=MoEConfig(8, 2, 32, 96))


class HaltError(Exception):
    """What stops a run in the middle."""


class Stopping(Toy):
    """A task that stops the run when its `last` step's rows are asked for."""

    last = 5

    def next_step(self):
        if self.turn == self.last:
            raise HaltError
        return super().next_step()


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (tiny(), {}),
        (tiny(tied=True), {"average": "ema", "ema_decay": 0.5, "precision": "bfloat16"}),
        (MOE, {"average": "tail", "tail": 0.9, "recompute": "layers"}),
    ],
    ids=["dense", "tied-ema-bfloat16", "moe-tail-recomputed"],
)
def test_a_resumed_run_is_the_same_bit_for_bit(config: ModelConfig, changes: dict[str, object], tmp_path: Path):
    """Stopped in step 6 of 7, with checkpoints of steps 2 and 4: step 5 is done twice, and every number is as in one go."""
    whole = run(tmp_path / "whole", Toy(micro=3), config=config, steps=7, **changes)
    with pytest.raises(HaltError):
        run(tmp_path / "cut", Stopping(micro=3), config=config, steps=7, **changes)
    resumed = run(tmp_path / "cut", Toy(micro=3), resume=True, config=config, steps=7, **changes)
    assert logged(tmp_path / "cut", "step", "tokens", "loss", "lr", "grad_norm") == logged(
        tmp_path / "whole", "step", "tokens", "loss", "lr", "grad_norm"
    )
    ours, theirs = (checkpoint.tensors_of(loop.network, loop.optimizer, loop.average) for loop in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.state == whole.state
    assert resumed.average is None or (resumed.average.count == whole.average.count > 0)  # type: ignore[union-attr]


def test_who_interrupts_a_run_is_told_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Interrupted(Toy):
        def next_step(self):
            if self.turn == 3:
                raise KeyboardInterrupt
            return super().next_step()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Interrupted())
    assert capsys.readouterr().err.splitlines()[-1] == "stopped after step 3; --resume goes on from step-000002"
    assert run(tmp_path / "run", Toy(), resume=True).state.step == 6


def test_the_newest_are_kept(tmp_path: Path):
    run(tmp_path / "run", steps=7, keep=2)
    assert [path.name for path in numbered(tmp_path / "run" / "checkpoints")] == ["step-000006", "step-000007"]


def spoil(path: Path, how: str) -> str:
    """Damage a checkpoint; returns what the message has to say."""
    file = path / "tensors-0000.safetensors"
    if how == "cut short":
        os.truncate(file, file.stat().st_size - 7)
    elif how == "altered":
        with file.open("r+b") as stream:
            stream.seek(-5, os.SEEK_END)
            stream.write(b"x")
    elif how == "missing":
        file.unlink()
    elif how == "no state":
        (path / "state.json").unlink()
    elif how == "another digit":  # JSON as before, and with it another data position
        text = (path / "state.json").read_text()
        assert '"turn": 6' in text
        (path / "state.json").write_text(text.replace('"turn": 6', '"turn": 2'))
    elif how == "no files":
        (path / "state.json").write_text('{"format": 1}')
    else:
        (path / "state.json").write_text((path / "state.json").read_text()[:40])
    return {
        "cut short": "cut short",
        "altered": "damaged",
        "missing": "passed over: tensors-0000.safetensors is missing",
        "no state": "passed over: state.json is missing",
        "another digit": "state.json is not what was written: damaged",
        "no files": "state.json names no files: damaged",
        "half a state": "not valid JSON",
    }[how]


@pytest.mark.parametrize("how", ["cut short", "altered", "missing", "no state", "half a state", "another digit", "no files"])
def test_a_damaged_checkpoint_is_passed_over(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path / "run", steps=6)
    whole = logged(tmp_path / "run", "step", "loss")
    said = spoil(tmp_path / "run" / "checkpoints" / "step-000006", how)
    capsys.readouterr()
    run(tmp_path / "run", Toy(), resume=True, steps=6)
    text = capsys.readouterr().err
    assert re.search(rf"step-000006: (?=passed over: ).*{said}", text)
    assert "step-000004: going on from step 4 of 6" in text
    assert logged(tmp_path / "run", "step", "loss") == whole


def test_a_damaged_one_is_not_kept_in_a_whole_ones_place(tmp_path: Path):
    """Its step comes later than the next checkpoint's: it would count as the newest, and the whole ones would go."""
    run(tmp_path / "run", steps=6)
    folder = tmp_path / "run" / "checkpoints"
    spoil(folder / "step-000006", "altered")
    with pytest.raises(HaltError):
        run(tmp_path / "run", Stopping(), resume=True, steps=6, keep=1, save_every=1)
    assert [path.name for path in folder.iterdir()] == ["step-000005"]
    found = newest(folder, print)
    assert found is not None
    assert found[1]["step"] == 5


def test_an_old_one_that_another_process_reads_goes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on network disks, where a file that is open elsewhere keeps its folder: no reason for a run to end."""
    remove = os.rmdir
    monkeypatch.setattr(os, "rmdir", lambda path, **given: busy() if "step-000002" in str(path) else remove(path, **given))
    loop = run(tmp_path / "run", steps=4, keep=1)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").exists()
    monkeypatch.undo()
    loop.save()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]


def busy() -> None:
    raise OSError(errno.ENOTEMPTY, "Directory not empty")


def test_who_reads_a_run_that_goes_on_is_given_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """With keep=1 the one checkpoint is removed for a newer one while its files are being read: nothing is damaged."""
    run(tmp_path / "run", steps=6, keep=1, schedule="constant")
    hashed = checkpoint.sha256_of

    def meanwhile(path: Path) -> str:
        monkeypatch.setattr(checkpoint, "sha256_of", hashed)
        run(tmp_path / "run", Toy(), resume=True, steps=8, keep=1, schedule="constant")
        return hashed(path)

    monkeypatch.setattr(checkpoint, "sha256_of", meanwhile)
    capsys.readouterr()
    found = checkpoint.whole(tmp_path / "run" / "checkpoints", print)
    assert found is not None
    assert found[1]["step"] == 8
    assert "passed over" not in capsys.readouterr().out


def test_all_damaged_is_an_error_and_half_written_ones_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path / "run", steps=4, keep=1)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-000005.part").mkdir()
    spoil(folder / "step-000004", "altered")
    with pytest.raises(ValueError, match="none of the 1 checkpoints is whole"):
        newest(folder, print)
    assert not (folder / "step-000005.part").exists()
    assert "half written when the run was killed; removed" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["before the old one is aside", "the old one aside", "a new name", "both there"])
def test_killed_while_a_checkpoint_gets_its_name(moment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With keep=1 there is only this one: whatever lies there, one is found, and nothing else stays."""
    run(tmp_path / "run", steps=4, keep=1)
    folder = tmp_path / "run" / "checkpoints"
    place, draft, aside = folder / "step-000004", folder / "step-000004.part", folder / "step-000004.old"
    if moment == "before the old one is aside":
        shutil.copytree(place, draft)
    elif moment == "the old one aside":
        shutil.copytree(place, draft)
        place.rename(aside)
    elif moment == "a new name":
        place.rename(draft)
    else:
        shutil.copytree(place, aside)
    found = newest(folder, print)
    assert found is not None
    assert found[0] == place
    assert found[1]["step"] == 4
    assert [path.name for path in folder.iterdir()] == ["step-000004"]
    assert ("lacked only its name" in capsys.readouterr().out) == (moment != "both there")
    assert run(tmp_path / "run", Toy(), resume=True, steps=4).state.step == 4


@pytest.mark.parametrize("call", [0, 1])
def test_at_no_call_a_name_is_given_without_a_whole_checkpoint(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint of the same step is there, damaged or not; the system stops at the first or the second renaming."""
    loop = run(tmp_path / "run", steps=2, keep=1)
    rename, calls = os.rename, 0

    def stopping(source: object, target: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise KeyboardInterrupt
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint.os, "rename", stopping)
    with pytest.raises(KeyboardInterrupt):
        loop.save()
    monkeypatch.undo()
    found = newest(tmp_path / "run" / "checkpoints", print)
    assert found is not None
    assert found[1]["step"] == 2


def test_a_half_line_of_metrics_goes_and_lines_behind_the_checkpoint_come_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path / "run", steps=6)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = [line["step"] for line in read_lines(path)]
    spoil(tmp_path / "run" / "checkpoints" / "step-000006", "altered")
    path.write_text(path.read_text() + '{"step": 6, "lo')
    run(tmp_path / "run", Toy(), resume=True, steps=6)
    assert "half written when the run was killed; left out" in capsys.readouterr().err
    assert [line["step"] for line in read_lines(path)] == whole


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    run(tmp_path / "run", steps=2)
    for config, named in ((tiny(ffn=96), "intermediate_size 128, this run's has 96"), (tiny(rope_theta=5.0), "rope_theta 1000000.0")):
        with pytest.raises(ValueError, match=named):
            run(tmp_path / "run", resume=True, config=config, steps=2)


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


def test_each_rank_looks_at_its_share_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every file is read by one rank; what one of them finds, all are told."""
    place = tmp_path / "step-000002"
    place.mkdir()
    for name in "abc":
        (place / name).write_text(name)
    state = {"format": 1, "files": digests_of(place, "abc")}
    (place / "state.json").write_text(json.dumps(state))
    read: list[str] = []
    hashed = checkpoint.sha256_of
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: read.append(path.name) or hashed(path))
    found = []
    for rank in range(2):

        class Rank(World):
            size = 2

            def agreed(self, value: Any) -> Any:
                return state, None  # as the first rank read it

        world = Rank()
        world.rank = rank
        read.clear()
        assert checkpoint.checked(place, world) == state
        found.append(list(read))
    assert found == [["a", "c"], ["b"]]
    world.every = lambda value: [value, ValueError("c is not what was written: damaged")]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="c is not what was written"):
        checkpoint.checked(place, world)


def test_a_world_reads_only_what_fits(tmp_path: Path):
    world = World()
    world.write(tmp_path, {"a": torch.ones(3), "b": torch.ones(())})
    with pytest.raises(ValueError, match=r"a has shape \[3\], this run's has \[4\]"):
        world.read(tmp_path, {"a": torch.zeros(4)})
    with pytest.raises(ValueError, match="1 tensors of this run are not there, the first is c"):
        world.read(tmp_path, {"c": torch.zeros(4)})
