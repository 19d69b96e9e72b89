"""What benches keep: figures as JSON and their table, row by row, and where each is from."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MACHINE = {"name": "Some CPU", "flags": ["avx2"], "cores": 2, "kind": "avx2", "load": 0.25}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bench's names, its modules found."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in [name for name in sys.modules if name == "peer" or name.startswith("peer.")]:
        monkeypatch.delitem(sys.modules, name)
    return lambda name: runpy.run_path(str(BENCH / name))


def test_rows_are_kept_and_a_row_that_is_measured_again_replaces_itself(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make = program("peer/results.py")["Results"]
    table = lambda rows: [f"{name} {row['rate']}" for name, row in rows.items()]  # noqa: E731
    for argv, rows in ((["a.py", "--rows", "one"], {"one": 1, "two": 2}), (["a.py", "--rows", "two"], {"two": 3})):
        monkeypatch.setattr(sys, "argv", argv)
        for row, value in rows.items():
            make("a", MACHINE, table, tmp_path).add(row, {"rate": value})
    kept = json.loads((tmp_path / "a_avx2.json").read_text())
    assert {name: row["rate"] for name, row in kept.items()} == {"one": 1, "two": 3}
    assert kept["two"]["machine"] == MACHINE
    lines = (tmp_path / "a_avx2.md").read_text().splitlines()
    assert lines[:3] == ["one 1", "two 3", ""]
    assert lines[3].startswith("- one: Some CPU (avx2; 0.25 cores in use by others), ")
    assert [line.rpartition("`")[0].rpartition("`")[2] for line in lines[3:]] == [
        f"python bench/a.py --rows {row}" for row in ("one", "two")
    ]


def test_rejection_sampling_takes_the_quickest_row_of_each_side(program: Any) -> None:
    rates = {"ours:16": 4.0, "ours:32": 6.0, "bfloat16:16": 1.0, "bfloat16:64": 1.5, "float32:32": 2.0}
    kept = {row: {"row": row, "asked": "m, 3 prompts", "answers": 12, "tokens": 120, "seconds": 12 / rate} for row, rate in rates.items()}
    kept["other"] = {"row": "bfloat16:16", "asked": "m, 9 prompts", "answers": 12, "tokens": 120, "seconds": 1.0}
    lines = program("reject.py")["table"](kept)
    assert "| float32:32 | 2.00 | 20 | 10.0 |" in lines
    assert [line for line in lines if " / " in line] == ["ours:32 / float32:32, the quickest of 2 and 3 rows: 3.00 (asked: 2)"]
    assert lines.index("m, 9 prompts") > lines.index("m, 3 prompts")


def test_adapters_are_set_against_one_round_by_round(program: Any) -> None:
    rates = {"none": [110.0, 220.0, 100.0], "one": [100.0, 200.0, 100.0], "eight": [90.0, 160.0, 80.0]}
    lines = program("adapters.py")["table"]({"m": {"rates": rates, "adapter_bytes": 35_000_000, "isa": "avx2"}})
    assert lines[-3:] == ["| none | 110.0 | 1.10 |  |", "| one | 100.0 | 1.00 |  |", "| eight | 90.0 | 0.80 | 0.8 |"]
