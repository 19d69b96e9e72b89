"""The README's Python runs as it stands, and its commands are commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qwen2.cli.app import VERBS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_runs(coder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert '"qwen2.5-coder:0.5b"' in block
    names: dict[str, object] = {}
    exec(block.replace('"qwen2.5-coder:0.5b"', repr(str(coder))), names)
    printed = capsys.readouterr().out
    half = len(printed) // 2
    assert printed[:half] + "\n" + printed[half + 1 :] == printed  # the answer, a line end, and the same answer streamed
    assert printed[:half] == printed[half + 1 :] != ""


def test_the_commands_are_verbs_of_ours() -> None:
    lines = [line.split("#")[0] for line in README.splitlines() if re.match(r"(cat \S+ \| )?qwen2 \w+ ", line)]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line)
        assert words[words.index("qwen2") + 1] in VERBS, line


def test_the_commands_of_make_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README.md: make {target}"
