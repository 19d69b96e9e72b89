"""Memory that a step has freed stays with the process: later steps of the same size take no new pages."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from qwen2.train.memory import keep_freed
assert keep_freed()
def step():
    parts = [torch.ones(8 << 20) for _ in range(3)]  # 32 MiB each
    return sum(float(part[-1]) for part in parts)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    step()
before = faults()
step()
print(faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt: memory.py leaves it as it is")
def test_later_steps_take_no_new_pages():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000, "96 MiB are 24,576 pages"
