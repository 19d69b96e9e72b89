"""How many threads are worth having: the physical cores that this process may use, no more than its groups' share of time pays for.

Two threads of one core share its arithmetic, so they count once. Left out: Windows, where there are no kernels and every processor
counts, and processors with large and small cores, which count alike.

    python -c "from qwen2.kernels.cores import physical_cores; print(physical_cores())"
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def physical_cores() -> int:
    """At least one."""
    found = sysctl("hw.physicalcpu") if sys.platform == "darwin" else None
    cores = allowed_cores() if found is None else found
    share = share_of_time()
    return max(1, cores if share is None else min(cores, share))


def processors() -> int:
    """How many processes that wait for one another little are worth having: one a processor that this one may use, siblings too."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = share_of_time()
    return max(1, allowed if share is None else min(allowed, share))


def allowed_cores(root: Path = ROOT) -> int:
    """The cores of the processors that this process may run on; where their system does not tell siblings, the processors."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in allowed:
        lines = _lines(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(lines[0] if lines else str(cpu))
    return len(siblings)


def sysctl(name: str) -> int | None:
    """A whole number that macOS has under this name; None where it has none."""
    value, size = ctypes.c_int32(0), ctypes.c_size_t(4)
    ask = getattr(ctypes.CDLL(None), "sysctlbyname", None)
    if ask is None or ask(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return None
    return value.value if value.value > 0 else None


def share_of_time(root: Path = ROOT) -> int | None:
    """Cores whose whole time the process's control groups may use, rounded up, as `docker --cpus` and systemd set it.

    Every group from the process's own to the outermost one limits it: the least counts. None where nothing is limited.
    """
    shares = []
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":  # version 2
            shares += [_share(*each) for each in _numbers(root, ("unified", ""), path, ("cpu.max",))]
        elif "cpu" in controllers.split(","):
            shares += [_share(*each) for each in _numbers(root, (controllers, "cpu"), path, ("cpu.cfs_quota_us", "cpu.cfs_period_us"))]
    return min((share for share in shares if share is not None), default=None)


def _numbers(root: Path, mounts: tuple[str, ...], path: str, files: tuple[str, ...]) -> Iterator[list[str]]:
    """What the files hold, of each of a path's groups that is there; a container may see the path but not its outer part."""
    group = PurePosixPath("/", *(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
    for mount in mounts:
        for each in (group, *group.parents):
            folder = root / "sys/fs/cgroup" / mount / each.relative_to("/")
            words = [word for file in files for line in _lines(folder / file) for word in line.split()]
            if len(words) == 2:
                yield words


def _share(quota: str, period: str) -> int | None:
    """Cores of a quota of time in each period; None where it is no limit."""
    if not (quota.isdecimal() and period.isdecimal() and int(period) > 0):  # "max", or -1 in version 1
        return None
    return max(1, -(-int(quota) // int(period)))


def _lines(path: Path) -> list[str]:
    """Of one of the system's files; none where it is not there."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
