"""The machine a figure was taken on, and the command: the processor's name and flags, its load, and how fast two threads read memory.

The ceiling is that of `qwen2 bench`: the median of many reads of memory far larger than the caches, in a process of its own. Left
out: the arithmetic ceiling.

    python bench/peer/machine.py 2
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm")
CEILING = """
import sys
from qwen2 import kernels
from qwen2.engine.speed import Ceilings
kernels.set_threads(int(sys.argv[1]))
ceilings = Ceilings()
ceilings.measure()
ceilings.measure()
print(ceilings.read)
"""


def processor() -> dict[str, object]:
    """Name, flags that matter and the number of cores, as Linux tells them; what Python knows elsewhere."""
    name, flags = name_and_flags()
    has = set(flags)
    kind = "amx" if "amx_int8" in has else "avx512" if "avx512f" in has else "avx2" if "avx2" in has else platform.machine()
    return {"name": name, "flags": flags, "cores": os.cpu_count(), "kind": kind, "load": round(idle(), 2)}


def name_and_flags() -> tuple[str, list[str]]:
    """Of the processor."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    has = set(flags[1].split()) if flags else set()
    return name[1] if name else platform.processor(), [flag for flag in FLAGS if flag in has]


def idle(patience: float = 120.0) -> float:
    """Wait until hardly anything else runs, so many seconds at most; the cores in use then, of one second. NaN where nothing tells."""
    begin, said = time.monotonic(), False
    while True:
        used = cores_in_use(1.0)
        if not used > 0.1 or time.monotonic() - begin > patience:
            if used > 0.1:
                print(f"{used:.2f} cores are in use by something else: these figures are of a busy machine", file=sys.stderr)
            return used
        if not said:
            print(f"waiting for an idle machine, {used:.2f} cores are in use", file=sys.stderr)
            said = True


def cores_in_use(seconds: float) -> float:
    """By all processes together, meanwhile. NaN where the system does not tell."""
    path = Path("/proc/stat")
    if not path.exists():
        return float("nan")

    def ticks() -> int:
        fields = [int(field) for field in path.read_text().split("\n", 1)[0].split()[1:]]
        return sum(fields[:3]) + sum(fields[5:7])  # user, nice, system; interrupts. Not idle, not waiting, not stolen

    before = ticks()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def command_line() -> str:
    """How this program was called. Of absolute paths the last parts: whose machine it was is no matter."""
    words = [os.sep.join(Path(word).parts[-3:]) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *words])


def read_ceiling(threads: int) -> float:
    """Bytes per second."""
    command = [sys.executable, "-c", CEILING, str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def cpu_seconds(pid: int) -> float | None:
    """Processor time a process has used so far; None where the system does not tell."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return None
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    print(json.dumps({**processor(), "read_bytes_per_second": read_ceiling(int(sys.argv[1]))}, indent=1))
