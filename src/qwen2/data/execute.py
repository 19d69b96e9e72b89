"""Where the tasks of a pipeline run: in processes here, or as jobs of a cluster, by datatrove's executors; a call ends with the last task.

    execute(steps, tasks, Place(workers=2), "out/work/logs/first")
    execute(steps, tasks, Place("slurm", partition="cpu", time="04:00:00", memory=8), "out/work/logs/first")

The tasks, and with them the bytes that come out, are the same everywhere. The machines of a cluster must see the inputs, the output
and this Python environment under the same paths as here. What is finished is not done again, and a job that still runs when the
same command is given again is waited for, not submitted twice.

Left out: making a cluster.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import dill
from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from qwen2.kernels.cores import processors

Kind = Literal["local", "slurm", "ray"]
JOB = "job"  # file of a pipeline's logs that holds the number of its Slurm job
PAUSE = 10.0  # seconds between two looks at a Slurm job


@dataclass(frozen=True)
class Place:
    """Where tasks run, and how many at a time (0: one a processor here, no limit on a cluster)."""

    kind: Kind = "local"
    workers: int = 0
    partition: str = ""  # of Slurm
    time: str = "24:00:00"  # that Slurm gives a task
    memory: int = 4  # GiB that a cluster gives a task

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"executor {self.kind!r}: must be one of {', '.join(get_args(Kind))}")
        if self.kind == "slurm" and not self.partition:
            raise ValueError("executor slurm: which partition? --partition NAME; sinfo lists them")
        if self.workers < 0 or self.memory < 1:
            raise ValueError(f"workers {self.workers}, memory {self.memory}: must be at least 0 and 1")


def execute(steps: list[PipelineStep], tasks: int, place: Place, logs: str) -> None:
    """Run a pipeline. ValueError where the cluster cannot be had, or where tasks did not finish."""
    {"local": _local, "slurm": _slurm, "ray": _ray}[place.kind](steps, tasks, place, os.path.abspath(logs))


# ---------------------------------------------------------------- here


class EndWithParent(PipelineStep):
    """Passes everything on; a worker process ends when the one that started it is gone, and does not write beside its successor."""

    name = "end with the parent"
    type = "WATCH"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """One thread a process, which waits."""
        parent = multiprocessing.parent_process()
        if parent is not None and not any(thread.name == self.name for thread in threading.enumerate()):
            threading.Thread(target=_end_after, args=(parent,), name=self.name, daemon=True).start()
        return data


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _local(steps: list[PipelineStep], tasks: int, place: Place, logs: str) -> None:
    """datatrove's tasks in a pool of Python's: its own waits for ever for a worker that was killed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are processes, one thread each
    executor = LocalPipelineExecutor([EndWithParent(), *steps], tasks=tasks, logging_dir=logs)
    left = executor.get_incomplete_ranks()
    workers = min(place.workers or processors(), len(left))
    if workers < 2:
        for rank in left:
            deepcopy(executor)._run_for_rank(rank)
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:  # Ctrl-C is answered here alone
        try:
            packed = dill.dumps(executor, byref=True)  # steps hold what Python's own pickle does not take
            for done in as_completed([pool.submit(_run, packed, rank) for rank in left]):
                done.result()
        except BrokenExecutor:
            raise ValueError(
                f"a worker was killed, as systems do where memory is short; what it did stands in {logs}; "
                "the same command goes on with what is left, and takes less memory with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _run(executor: bytes, rank: int) -> None:
    dill.loads(executor)._run_for_rank(rank, rank)


# ---------------------------------------------------------------- on Slurm


def _slurm(steps: list[PipelineStep], tasks: int, place: Place, logs: str) -> None:
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise ValueError(f"{program} is not here: --executor slurm is for a machine from which Slurm's jobs are submitted")
    mark = Path(logs) / JOB
    executor = ArrayJobs(
        steps,
        tasks=tasks,
        time=place.time,
        partition=place.partition,
        workers=place.workers or -1,
        mem_per_cpu_gb=place.memory,
        job_name=f"qwen2-{Path(logs).name}",
        qos="",
        env_command=f"export TOKENIZERS_PARALLELISM=false PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        logging_dir=logs,
        job_id_retriever=partial(noted, str(mark)),
    )
    if mark.exists():
        _wait(executor, mark.read_text())
    if executor.get_incomplete_ranks():
        try:
            executor.run()
        except subprocess.CalledProcessError as error:
            raise ValueError(
                f"{error.cmd[0]} ended with {error.returncode}: what it said stands above; the job: {logs}/launch_script.slurm"
            ) from None
        _wait(executor, mark.read_text())
    _all_finished(executor, executor.slurm_logs_folder)


class ArrayJobs(SlurmPipelineExecutor):
    """datatrove's, without its last job, which adds up statistics: nobody reads them, and where tasks fail it would wait for ever."""

    def launch_merge_stats(self) -> None:
        """Leave it."""


def noted(mark: str, said: str) -> str:
    """The number of a job that sbatch has just taken, kept at once: who is killed now must not submit it a second time."""
    number = said.split()[-1]
    draft = Path(f"{mark}.part")
    draft.write_text(number)
    draft.replace(mark)
    return number


def _wait(executor: PipelineExecutor, job: str) -> None:
    """Until all tasks are finished, or Slurm knows of no job that could still finish them."""
    while executor.get_incomplete_ranks() and _is_queued(job):
        time.sleep(PAUSE)
    if executor.get_incomplete_ranks():
        time.sleep(PAUSE)  # shared disks show some files late


def _is_queued(job: str) -> bool:
    done = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
    if done.returncode:  # a number that it does not know any more is an error too; anything else passes, as when its server is busy
        return "invalid job id" not in done.stderr.lower()
    return bool(done.stdout.strip())


# ---------------------------------------------------------------- on Ray


def _ray(steps: list[PipelineStep], tasks: int, place: Place, logs: str) -> None:
    if importlib.util.find_spec("ray") is None:
        raise ValueError("ray is not installed: pip install 'datatrove[ray]', here and on the cluster's machines")
    ray = importlib.import_module("ray")
    ray.init(ignore_reinit_error=True, log_to_driver=False)  # the cluster that RAY_ADDRESS names, else one on this machine
    executor = RayPipelineExecutor(steps, tasks=tasks, workers=place.workers or -1, mem_per_cpu_gb=place.memory, logging_dir=logs)
    executor.run()
    _all_finished(executor, logs)


def _all_finished(executor: PipelineExecutor, logs: str) -> None:
    left = executor.get_incomplete_ranks()
    if left:
        raise ValueError(
            f"{len(left)} of {executor.world_size} tasks did not finish, the first is {left[0]}; why, stands in {logs}; "
            "the same command goes on with them"
        )
