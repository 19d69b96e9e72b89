"""Recipes as people call them, and the quick base model that several of them go on from, made once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def recipe(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """What became of runs/NAME."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [str(ROOT / "runs" / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)


@pytest.fixture(scope="session")
def quick_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of runs/base.sh --quick."""
    out = tmp_path_factory.mktemp("runs") / "base"
    done = recipe("base.sh", "--quick", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out
