"""How much memory can still be taken, and how much of it the cache of a model may have where nobody says.

Linux: what the kernel calls available (free, or given back when somebody wants it), or what the control groups that the process is in
still allow (a container's limit), whichever is less. macOS and other systems of that kind: half of all there is. A CUDA device: what
is free there.

    free_memory("cpu")          # bytes; None where the system does not say
"""

from __future__ import annotations

import os
from pathlib import Path

SHARE = 2  # one part in so many of what is free is the cache's: activations, other models and other programs need some too
UNLIMITED = 1 << 60  # bytes; version 1 of control groups writes a number like this where there is no limit
GROUPS = {  # version of control groups: files with the limit, with what is used, and the line of memory.stat that can be given back
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_memory(device: str = "cpu", root: Path = Path("/")) -> int | None:
    """Bytes that can still be taken on a device; `root` is where /proc and /sys lie. None where the system does not say."""
    if device.partition(":")[0] == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    info = root / "proc/meminfo"
    if not info.exists():
        names = getattr(os, "sysconf_names", {})
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if "SC_PHYS_PAGES" in names else None
    available = _numbers(info).get("MemAvailable")
    if available is None:
        return None
    return max(0, min([available * 1024, *_allowed(root)]))


def cache_blocks(window: int, max_batch: int, block_bytes: int, free: int | None) -> int:
    """How many blocks the cache of a model may have: a share of what is free, a `window` at least, one for each answer at most."""
    most = max_batch * window
    return most if free is None else max(window, min(most, free // SHARE // block_bytes))


def _allowed(root: Path) -> list[int]:
    """What each control group on the way to the process's own still allows. Where the path is the host's, only what is seen here."""
    groups = root / "proc/self/cgroup"
    found: list[int] = []
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, base = (1, root / "sys/fs/cgroup/memory") if controllers else (2, root / "sys/fs/cgroup")
        own = base / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder != base and base not in folder.parents:
                break
            left = _left(folder, *GROUPS[version])
            found += [] if left is None else [left]
    return found


def _left(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """Bytes that one group still allows; None where it has no limit, or is not to be seen."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max" or int(most) >= UNLIMITED:
            return None
        return int(most) - int((folder / used).read_text()) + _numbers(folder / "memory.stat").get(reclaimable, 0)
    except (OSError, ValueError):
        return None


def _numbers(path: Path) -> dict[str, int]:
    """Names and numbers of a file that has one of each in a line."""
    pairs = (line.replace(":", " ").split()[:2] for line in path.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
