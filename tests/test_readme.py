"""The README's Python runs as it stands, and its commands are commands."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest

from qwen2.cli.app import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_runs(coder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert '"qwen2.5-coder:0.5b"' in block
    names: dict[str, object] = {}
    exec(block.replace('"qwen2.5-coder:0.5b"', repr(str(coder))), names)
    printed = capsys.readouterr().out
    half = len(printed) // 2
    assert printed[:half] + "\n" + printed[half + 1 :] == printed  # the answer, a line end, and the same answer streamed
    assert printed[:half] == printed[half + 1 :] != ""


def test_the_python_of_the_documents_names_what_is_there() -> None:
    """Imports of every page import, and each page's Python uses no name that it did not make before."""
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        source = "\n".join(re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL))
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})
        ruff = [Path(sysconfig.get_path("scripts")) / "ruff", "check", "--no-cache", "--isolated", "--select", "F821", "-"]
        done = subprocess.run(ruff, input=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{document.name}: {done.stdout}"


def test_the_commands_are_verbs_of_ours() -> None:
    lines = [line.split("#")[0] for line in README.splitlines() if re.match(r"(cat \S+ \| )?qwen2 \w+ ", line)]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line)
        assert words[words.index("qwen2") + 1] in VERBS, line


def test_the_commands_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README.md: make {target}"


def test_what_the_documents_link_to_exists() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_speeds_are_those_of_the_tables() -> None:
    rows = [line.strip("|").split("|") for line in README.splitlines() if line.startswith("| ")]
    (links,) = [row[1:] for row in rows if row[0].strip().startswith("figures")]
    tables = [table_of(ROOT / re.findall(r"\((.*?)\)", link)[0]) for link in links]
    names = {
        "prompt of 512 tokens": "prefill 512, tok/s",
        "prompt of 4,096 tokens": "prefill 4,096, tok/s",
        "answer, at depth 0": "decode at depth 0, tok/s",
        "answer, at depth 4,096": "decode at depth 4,096, tok/s",
        "16 answers at once": "decode of 16 streams together, tok/s",
        "load to the first token": "load to first token, s",
        "peak memory, MiB, beside llama.cpp's": "peak memory, MiB",
    }
    said = {row[0].strip(): row[1:] for row in rows if row[0].strip() in names}
    assert set(said) == set(names)
    for name, cells in said.items():
        for cell, table in zip(cells, tables, strict=True):
            row = table[names[name]]
            if name.startswith("peak"):
                expected, tolerance = [row["ours"], row["llama.cpp"]], 0.0
            else:
                expected, tolerance = [row["ours / llama.cpp"], row["ours / best other"]], 0.0501  # a tenth, rounded
            for number, truth in zip(cell.split(","), expected, strict=False):
                assert abs(float(number) - truth) <= tolerance, f"README.md, {name}: {number} where the table says {truth}"


def table_of(path: Path) -> dict[str, dict[str, float]]:
    """The first table of a report, by row and column."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in path.read_text(encoding="utf-8").splitlines() if line[:2] == "| "
    ]
    heads, *rest = lines
    numbers = [[float(cell.replace(",", "")) if cell[:1].isdigit() else float("nan") for cell in cells[1:]] for cells in rest]
    return {cells[0]: dict(zip(heads[1:], row, strict=True)) for cells, row in zip(rest, numbers, strict=True)}
