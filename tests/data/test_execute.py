"""Where tasks run: on a Slurm of four small programs, whole chain; what Ray is asked for; and that no worker outlives its parent."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datatrove.pipeline.base import PipelineStep

from qwen2.cli.app import main
from qwen2.data import execute as module
from qwen2.data.execute import Place, execute
from qwen2.data.prepare import prepare_text
from qwen2.data.recipe import Recipe, Source

PROGRAMS = {  # a Slurm that does a job's tasks at once, one after the other
    "sbatch": r"""
script=${@: -1}
echo "$(basename "$0") $*" >> "$SLURM/calls"
number=$(($(cat "$SLURM/number" 2> /dev/null || echo 100) + 1)); echo $number > "$SLURM/number"
[ -e "$SLURM/one" ] && [ $number -gt 101 ] && { echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }
[ -e "$SLURM/full" ] && { echo "sbatch: error: no such partition" >&2; exit 1; }
grep '^#SBATCH' "$script" > "$SLURM/options-$number"
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
if grep -q launch_pickled_pipeline "$script" && [ ! -e "$SLURM/idle" ]; then
  for task in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash "$script" > "$SLURM/log-$number-$task" 2>&1; done
fi
echo "Submitted batch job $number"
""",
    "srun": 'while [ "${1#-}" != "$1" ]; do [ "$1" = -n ] && shift; shift; done; exec "$@"',
    "scontrol": "echo here",
    "squeue": r"""
echo "squeue $*" >> "$SLURM/calls"
[ -e "$SLURM/busy" ] && { rm "$SLURM/busy"; echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }
echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1
""",
}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Slurm is programs on PATH")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the cluster keeps what it was asked."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text.strip()}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("SLURM", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")  # not this environment's: a job has to find that by itself
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # where the step of these tests is
    monkeypatch.setattr(module, "PAUSE", 0.0)
    return folder


class Write(PipelineStep):
    """Leaves a file a task."""

    name, type = "write", "TEST"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        Path(self.folder, f"{rank}-of-{world_size}").touch()


def options(slurm: Path, number: int) -> dict[str, str]:
    lines = (slurm / f"options-{number}").read_text().splitlines()
    return {name: value for name, _, value in (line.removeprefix("#SBATCH --").partition("=") for line in lines)}


def corpus(folder: Path) -> Recipe:
    folder.mkdir()
    rows = [json.dumps({"text": f"This is text number {n}, and it is of no great length.", "language": "en"}) for n in range(9)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    return Recipe("test", (Source(path="a.jsonl"),), steps=("personal",), tasks=1)


def test_the_same_bytes_by_slurm(slurm: Path, tmp_path: Path) -> None:
    recipe = corpus(tmp_path / "in")
    place = Place("slurm", workers=3, partition="cpu", time="01:00:00", memory=7)
    by_slurm = prepare_text(recipe, tmp_path / "in", None, tmp_path / "out", place, lambda line: None)
    assert by_slurm == prepare_text(recipe, tmp_path / "in", None, tmp_path / "local", say=lambda line: None)
    assert by_slurm["text"]
    asked = options(slurm, 101)
    assert {name: asked[name] for name in ("partition", "time", "mem-per-cpu", "array", "job-name")} == {
        "partition": "cpu", "time": "01:00:00", "mem-per-cpu": "7G", "array": "0-0%3", "job-name": "qwen2-first",
    }  # fmt: skip
    assert "qos" not in asked


def test_every_task_and_what_is_finished_is_not_asked_for_again(slurm: Path, tmp_path: Path) -> None:
    place = Place("slurm", partition="cpu")
    execute([Write(str(tmp_path))], 2, place, str(tmp_path / "logs"))
    assert sorted(path.name for path in tmp_path.glob("*-of-*")) == ["0-of-2", "1-of-2"]
    assert options(slurm, 101)["array"] == "0-1"
    before = (slurm / "calls").read_text()
    execute([Write(str(tmp_path))], 2, place, str(tmp_path / "logs"))
    assert (slurm / "calls").read_text() == before


def test_a_job_is_known_from_the_moment_it_is_submitted(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed right behind sbatch, and by a Slurm that takes no more jobs of this user: there is one job, and it is waited for."""
    (slurm / "one").touch()
    (slurm / "idle").touch()
    monkeypatch.setattr(module, "_wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        execute([Write(str(tmp_path))], 2, Place("slurm", partition="cpu"), str(tmp_path / "logs"))
    monkeypatch.undo()
    assert (tmp_path / "logs" / "job").read_text() == "101"
    assert (slurm / "number").read_text().strip() == "101"


def test_a_job_that_ends_without_its_tasks(slurm: Path, tmp_path: Path) -> None:
    (slurm / "idle").touch()
    (slurm / "busy").touch()  # one look at the queue fails for another reason, and is repeated
    with pytest.raises(ValueError, match=r"2 of 2 tasks did not finish, the first is 0; why, stands in .*slurm_logs; the same command"):
        execute([Write(str(tmp_path))], 2, Place("slurm", partition="cpu"), str(tmp_path / "logs"))
    calls = (slurm / "calls").read_text().splitlines()
    assert [line for line in calls if line.startswith("squeue")] == ["squeue --noheader --jobs 101"] * 2
    (slurm / "idle").unlink()
    execute([Write(str(tmp_path))], 2, Place("slurm", partition="cpu"), str(tmp_path / "logs"))
    again = (slurm / "calls").read_text().splitlines()[len(calls) :]
    assert again[0] == "squeue --noheader --jobs 101", "the job of the sitting before is looked for first"
    assert (tmp_path / "1-of-2").exists()


def test_what_slurm_refuses_is_one_line(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm / "full").touch()
    with pytest.raises(ValueError, match=r"sbatch ended with 1: what it said stands above; the job: .*launch_script\.slurm"):
        execute([Write(str(tmp_path))], 2, Place("slurm", partition="none"), str(tmp_path / "logs"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch is not here: --executor slurm is for a machine"):
        execute([Write(str(tmp_path))], 2, Place("slurm", partition="none"), str(tmp_path / "logs"))


def test_ray_is_asked_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Executor:
        world_size = 2

        def __init__(self, steps: list[PipelineStep], **given: Any) -> None:
            made.append(given)

        def run(self) -> None:
            made.append({"run": True})

        def get_incomplete_ranks(self) -> list[int]:
            return [1] if len(made) > 2 else []

    found = SimpleNamespace(init=lambda **given: made.append(given))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if not made and name == "ray" else SimpleNamespace())
    monkeypatch.setattr(module, "RayPipelineExecutor", Executor)
    real = importlib.import_module
    monkeypatch.setattr(module.importlib, "import_module", lambda name: found if name == "ray" else real(name))
    with pytest.raises(ValueError, match=r"ray is not installed: pip install 'datatrove\[ray\]'"):
        execute([Write(str(tmp_path))], 2, Place("ray"), str(tmp_path / "logs"))
    made.append({})
    with pytest.raises(ValueError, match="1 of 2 tasks did not finish, the first is 1"):
        execute([Write(str(tmp_path))], 2, Place("ray", memory=3), str(tmp_path / "logs"))
    assert made[2] == {"tasks": 2, "workers": -1, "mem_per_cpu_gb": 3, "logging_dir": str(tmp_path / "logs")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--executor", "slurm"], "executor slurm: which partition?"),
        (["--partition", "cpu"], "--partition: --executor local does not know it"),
        (["--executor", "ray", "--time", "1"], "--time: --executor ray does not know it"),
        (["--executor", "ray", "--memory", "0"], "memory 0: must be at least 0 and 1"),
    ],
)
def test_flags_that_do_not_go_together(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", "quick", str(tmp_path / "out"), *words]) == 1
    assert message in capsys.readouterr().err


CHILD = """
import sys, time
from pathlib import Path
from datatrove.pipeline.base import PipelineStep
from qwen2.data.execute import Place, execute

class Sleep(PipelineStep):
    name, type = "sleep", "TEST"
    def run(self, data=None, rank=0, world_size=1):
        import os
        Path(sys.argv[1], f"{rank}.part").write_text(str(os.getpid()))
        Path(sys.argv[1], f"{rank}.part").rename(Path(sys.argv[1], f"{rank}.pid"))
        time.sleep(60)

if __name__ == "__main__":
    execute([Sleep()], 2, Place(workers=2), sys.argv[1] + "/logs")
"""


class Kill(PipelineStep):
    """Is what the system's killer picks, where a file says so; leaves a file a task where not."""

    name, type = "kill", "TEST"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        if rank == 1 and (self.folder / "short of memory").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        with (self.folder / str(rank)).open("a") as file:
            file.write("x")


def test_a_worker_that_is_killed_ends_the_call_and_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "short of memory").touch()
    with pytest.raises(ValueError, match=r"a worker was killed, .*; the same command goes on with what is left, .* fewer --workers"):
        execute([Kill(str(tmp_path))], 5, Place(workers=2), str(tmp_path / "logs"))
    (tmp_path / "short of memory").unlink()
    execute([Kill(str(tmp_path))], 5, Place(workers=2), str(tmp_path / "logs"))
    assert [(tmp_path / str(rank)).exists() for rank in range(5)] == [True] * 5
    assert (tmp_path / "1").read_text() == "x"


class Fail(Kill):
    """Fails in one task."""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        if rank == 1:
            raise ValueError("task 1 cannot")
        super().run(data, rank, world_size)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_task_raises_is_raised(workers: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task 1 cannot"):
        execute([Fail(str(tmp_path))], 3, Place(workers=workers), str(tmp_path / "logs"))
    assert (tmp_path / "0").read_text() == "x"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_no_worker_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "child.py"), str(tmp_path)], start_new_session=True)
    until(lambda: len(list(tmp_path.glob("*.pid"))) == 2 or parent.poll() is not None)
    workers = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    try:
        until(lambda: not any(is_alive(pid) for pid in workers))
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(parent.pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def until(what: Any) -> None:
    """Wait for something that comes at once or never."""
    for _ in range(600):
        if what():
            return
        time.sleep(0.05)
    pytest.fail("waited for 30 seconds")
