"""The kernels for Arm on a processor of another kind: their products, cross-compiled and emulated. neon.sh without arguments does more."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64", "cmake")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() in ("aarch64", "arm64"), reason="this processor runs them itself")
@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} missing; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user cmake")
def test_products_in_an_emulator() -> None:
    script, outside = Path(__file__).with_name("neon.sh"), ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if name not in outside} | {"PYTHON": sys.executable}
    done = subprocess.run(
        [script, "-n", "0", "tests/kernels/test_products.py"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "no kernels for this processor" not in done.stdout
