"""The Dockerfile builds from what is here: every file that it copies is there and reaches the build, and all that a wheel needs is copied."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

from qwen2.cli.app import VERBS
from qwen2.cli.serve import Flags

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "Dockerfile").read_text().splitlines()
COPIED = [name for line in LINES if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]]
PROJECT = (ROOT / "pyproject.toml").read_text()


def reaches(path: str) -> bool:
    """Whether the build is given a file, by the rules of .dockerignore: the last one that fits decides."""
    given = True
    for rule in (ROOT / ".dockerignore").read_text().split():
        pattern = rule.removeprefix("!").removeprefix("**/")
        if any(fnmatchcase(part, pattern) for part in (path, *path.split("/"))):
            given = rule.startswith("!")
    return given


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    assert {"src", "constraints.txt", "pyproject.toml", "CMakeLists.txt"} <= set(COPIED)
    for name in COPIED:
        assert (ROOT / name).exists(), f"Dockerfile: there is no {name}"
        assert reaches(name), f".dockerignore keeps {name} from the build"
    assert not reaches("src/qwen2/__pycache__/x.pyc")
    assert not reaches(".venv")


def test_a_wheel_needs_nothing_else() -> None:
    readme, licences = re.findall(r'^readme = "(.*)"$|^license-files = \["(.*)"\]$', PROJECT, re.MULTILINE)
    assert {*filter(None, (*readme, *licences))} == {"README.md", "LICENSE"}
    assert {"README.md", "LICENSE"} <= set(COPIED)
    assert set(re.findall(r"^set\(KERNELS (\w+)/", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)) == {"src"}


def test_it_starts_verbs_that_there_are() -> None:
    (entry,) = [json.loads(line.removeprefix("ENTRYPOINT ")) for line in LINES if line.startswith("ENTRYPOINT ")]
    assert f'[project.scripts]\n{entry[0]} = "' in PROJECT
    assert [int(line.split()[1]) for line in LINES if line.startswith("EXPOSE ")] == [Flags().port]
    used = re.findall(r"^#\s+docker run .* qwen2 (\w+)", "\n".join(LINES), re.MULTILINE)
    assert used == ["run", "serve"]
    assert set(used) <= set(VERBS)
