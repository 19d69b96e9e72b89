"""A disk that is full, or a folder that is none: said with its place, and what was there before stays."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest

from qwen2.config import tiny
from qwen2.train import checkpoint
from qwen2.train.folder import RunFolder
from qwen2.train.loop import Loop
from qwen2.train.world import World
from tests.conftest import random_network
from tests.train.conftest import Toy, run, small


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


def test_a_run_s_folder_is_no_file(tmp_path: Path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="run: is a file, and a run is a folder; name another with --out"):
        RunFolder(tmp_path / "run")


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"the disk has 1,000 free.*there is none before it"):
        run(tmp_path / "run", steps=2)
