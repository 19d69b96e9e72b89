"""Recipes as people call them, the quick base model that several of them go on from, made once, and llama.cpp as npm has it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
NODE_LLAMA_CPP = "3.22.1"  # of the npm package that carries llama.cpp compiled


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


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str, int], dict[str, Any]]:
    """llama.cpp's greedy way on from a text: of (file, text, how many tokens) the ids of the text, `prompt`, and those behind it, `ids`."""
    machine = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}.get(platform.machine())
    if sys.platform != "linux" or machine is None:
        pytest.skip("node-llama-cpp's package for this system is not known here")
    assert shutil.which("npm"), "npm is needed, as for the corpora"
    version = subprocess.run(["node", "--version"], check=True, capture_output=True, text=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < 20:
        pytest.skip(f"node-llama-cpp needs node 20, here is {version}")
    folder = tmp_path_factory.mktemp("llama.cpp")
    shutil.copy(SCRIPT, folder)
    names = [f"node-llama-cpp@{NODE_LLAMA_CPP}", f"@node-llama-cpp/{machine}@{NODE_LLAMA_CPP}"]
    install = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--omit=optional", "--ignore-scripts", *names]
    subprocess.run(install, cwd=folder, check=True, capture_output=True, timeout=300)

    def go_on(file: Path, text: str, count: int) -> dict[str, Any]:
        done = subprocess.run(
            ["node", SCRIPT.name, file, text, str(count)], cwd=folder, check=False, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return go_on
