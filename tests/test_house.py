"""The house rules that a program can check: small units, plain characters, a true file map, a start without torch.

Each failure names the offender and what to do. Left out: taste, and what ruff, mypy and import-linter already say.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "qwen2").rglob("*.py"))
PYTHON = SOURCES + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "bench").rglob("*.py"))
NATIVE = [path for ending in ("*.cpp", "*.h") for path in sorted((ROOT / "src").rglob(ending))]

FILE_LINES = 400
FUNCTION_LINES = 60
MODEL_LINES = 300
NAMES_TO_AVOID = {"utils", "util", "common", "helpers", "helper", "misc"}
TOOL_KEYWORD = "\u273f"  # the flower around the keywords of Qwen2's tool prompt, legible only as itself


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_files_are_short() -> None:
    limit = {"src/qwen2/model/qwen2.py": MODEL_LINES}
    for path in PYTHON + NATIVE:
        lines, allowed = len(path.read_text(encoding="utf-8").splitlines()), limit.get(shown(path), FILE_LINES)
        assert lines <= allowed, f"{shown(path)} has {lines} lines, the limit is {allowed}: its idea has split, split the file by it"


def test_functions_are_short() -> None:
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= FUNCTION_LINES, (
                    f"{shown(path)}:{node.lineno} {node.name}() has {lines} lines, the limit is {FUNCTION_LINES}: "
                    "give its steps names of their own"
                )


def test_files_are_named_for_what_they_hold() -> None:
    for path in PYTHON:
        assert path.stem not in NAMES_TO_AVOID, (
            f"{shown(path)}: name it for the one concept it holds, or put its functions beside their use"
        )


def test_modules_say_what_they_are() -> None:
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), (
            f"{shown(path)}: begin with a docstring: what it is, what it leaves out"
        )


def test_sources_are_ascii() -> None:
    for path in SOURCES + NATIVE:
        allowed = {TOOL_KEYWORD} if path.parent.name == "tokenizer" else set()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            strange = sorted(c for c in line if ord(c) > 126 and c not in allowed)
            assert not strange, f"{shown(path)}:{number}: {strange[0]!a} is not ASCII; write it as an escape, or in words in a comment"


def test_nothing_is_left_open() -> None:
    for path in SOURCES:
        found = re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", path.read_text(encoding="utf-8"))
        assert not found, f"{shown(path)}: {found and found.group()}: finish it, or say in the docstring what is left out"


TRAINING = {"data", "post", "train"}  # the packages that may import what the extra `train` brings


def imports_of(paths: list[Path]) -> set[str]:
    """The packages that sources import, wherever they do, without Python's own and ours."""
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"qwen2"}


def declared(list_name: str) -> set[str]:
    """The packages of a list in pyproject.toml, as they are imported."""
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition(f"\n{list_name} = [\n")[2].partition("\n]")[0]
    names = {name.replace("-", "_").removesuffix("_py") for name in re.findall(r'^    "([\w-]+)', listed, re.MULTILINE)}
    return {{"pyyaml": "yaml"}.get(name, name) for name in names}


def test_what_is_imported_is_declared() -> None:
    """pyproject.toml names the packages that the sources import: none missing, none for nothing; what only training needs is an extra."""
    training = [path for path in SOURCES if path.relative_to(ROOT / "src" / "qwen2").parts[0] in TRAINING]
    core = imports_of([path for path in SOURCES if path not in training])
    assert declared("dependencies") == core, "pyproject.toml: dependencies and imports differ"
    undeclared = imports_of(training) - core - declared("train")
    assert not undeclared, f"pyproject.toml: name {sorted(undeclared)} in the extra train, which data/, post/ and train/ may import"


def test_the_file_map_is_true() -> None:
    """docs/architecture.md has one entry per package, and each names exactly the package's modules."""
    named = {}
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        if entry := re.match(r"- `(\w+)/`", line):
            named[entry.group(1)] = set(re.findall(r"`(\w+)\.py`", line))
    package = ROOT / "src" / "qwen2"
    found = {folder.parent.name: modules_in(folder.parent) for folder in package.rglob("__init__.py") if folder.parent != package}
    assert named.keys() == found.keys(), f"packages in docs/architecture.md {sorted(named)}, in src/qwen2 {sorted(found)}"
    for name, modules in found.items():
        wrong = modules ^ named[name]
        assert not wrong, f"docs/architecture.md, entry {name}/: add what is missing or strike what is gone: {sorted(wrong)}"


def test_the_modules_that_docstrings_name_exist() -> None:
    """A module's first docstring sends its readers to files that are there; main.py is what a tested solution is called."""
    there = {path.name for folder in ("src", "bench", "tests") for path in (ROOT / folder).rglob("*.py")} | {"main.py"}
    for path in (ROOT / "src" / "qwen2").rglob("*.py"):
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        gone = {name for name in re.findall(r"\b\w+\.py\b", said) if name not in there}
        assert not gone, f"{path.relative_to(ROOT)}: its docstring names {sorted(gone)}, which no file is called"


def test_the_family_table_is_counted() -> None:
    """The README's table of sizes, cell by cell, from the released configurations."""
    from qwen2.config import FAMILY

    rows = re.findall(r"^\| `(qwen2:[^`]+)` \| (.+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == [name for name in FAMILY if not name.endswith("-base")]
    for name, cells in rows:
        c, total = FAMILY[name].config, FAMILY[name].config.parameters()
        active = "all" if c.active_parameters() == total else f"{c.active_parameters():,}"
        counted = [f"{total:,}", active, str(c.layers), f"{c.hidden:,}", f"{c.heads} / {c.kv_heads}", f"{c.cache_bytes_per_token():,} B"]
        assert cells.split(" | ") == [*counted, FAMILY[name].licence], f"README.md, row {name}: write what is counted"


def modules_in(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__"}


@pytest.mark.parametrize(
    "statement",
    [
        "import qwen2; dir(qwen2); qwen2.__version__",
        "import qwen2.config",
        "from qwen2 import ModelConfig",
        "from qwen2 import Tokenizer",
        "from qwen2 import kernels; kernels.report()",
        "run('--help')",
        "run('--version')",
        "run('run', '--help')",
        "run('list')",
        "run('plan', 'qwen2:72b', '--gpus', '64')",
    ],
)
def test_starts_without_torch(statement: str, tmp_path: Path) -> None:
    program = f"""
import sys
def run(*words):
    from qwen2.cli.app import main
    sys.argv = ["qwen2", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
{statement}
heavy = sorted({{"torch", "transformers", "huggingface_hub"}} & sys.modules.keys())
assert not heavy, f"imported at start: {{heavy}}; import them in the function that needs them"
"""
    environment = {"PATH": "", "QWEN2_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "src"), "SYSTEMROOT": "C:\\Windows"}
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert outcome.returncode == 0, outcome.stderr


def test_public_names_resolve() -> None:
    import qwen2

    for name in qwen2.__all__:
        assert getattr(qwen2, name) is not None
        assert name in dir(qwen2)
    with pytest.raises(
        AttributeError, match=r"module 'qwen2' has no attribute 'llm'; it has LLM, ModelConfig, SamplingParams, Tokenizer, load"
    ):
        _ = qwen2.llm
