"""docs/peers.md is true: each test that it names is there, and each complaint has one, or a reason why not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "peers.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| complaint", "| class"))
]


def test_every_complaint_has_a_test_or_a_reason() -> None:
    assert len(ROWS) > 40
    for complaint, answer in ROWS:
        assert "::test_" in answer or answer.startswith(("not yet: ", "no test, since ")), f"docs/peers.md: {complaint}"


def test_the_tests_and_files_exist() -> None:
    for complaint, answer in ROWS:
        for named in re.findall(r"`([^`]+)`", answer):
            file, _, test = named.partition("::")
            assert (ROOT / file).is_file(), f"docs/peers.md: {complaint}: there is no {file}"
            if test:
                names = {
                    node.name
                    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
                    if isinstance(node, ast.FunctionDef)
                }
                assert test in names, f"docs/peers.md: {complaint}: {file} has no {test}"
