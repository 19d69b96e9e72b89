"""Checkpoints and run folders: resuming bit for bit, what is damaged, what does not fit, locks, a disk without room."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.config import ModelConfig, MoEConfig, tiny
from qwen2.train import checkpoint
from qwen2.train.checkpoint import newest, numbered
from qwen2.train.folder import RunFolder
from qwen2.train.loop import Loop
from qwen2.train.metrics import read_lines
from qwen2.train.tensors import digests as digests_of
from qwen2.train.world import World
from tests.conftest import random_network
from tests.train.conftest import Toy, logged, run, small

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


def digests(path: Path) -> dict[str, list[object]]:
    return json.loads((path / "state.json").read_text())["files"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process's files are the system's")
def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(tmp_path: Path):
    """The system refuses the file in the middle: one error, nothing half left, and the run can be resumed."""
    run(tmp_path / "run", steps=2)
    before = digests(tmp_path / "run" / "checkpoints" / "step-000002")
    network = random_network(tiny())
    with RunFolder(tmp_path / "run") as folder:
        loop = Loop(network, Toy().task(), small(steps=4, save_every=4), folder, World())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            with pytest.raises(OSError, match=r"could not be written \(.*\); step-000002 is whole: make room and go on with --resume"):
                loop.run(resume=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert digests(tmp_path / "run" / "checkpoints" / "step-000002") == before
    assert run(tmp_path / "run", Toy(), resume=True, steps=4, save_every=4).state.step == 4


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process's files are the system's")
@pytest.mark.parametrize("tensorboard", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard writes on a thread
def test_a_full_disk_between_checkpoints_is_said_with_its_place(tensorboard: bool, tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"its metrics could not be written .*; make room and go on with --resume") as raised:
            run(tmp_path / "run", steps=20, save_every=0, tensorboard=tensorboard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename == str(tmp_path / "run")


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"the disk has 1,000 free.*there is none before it"):
        run(tmp_path / "run", steps=2)


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
