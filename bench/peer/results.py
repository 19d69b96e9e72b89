"""A bench's results in bench/results/: raw figures as JSON, and the table that is made of them as Markdown, each with where it is from.

Rows may be measured alone: those that are there are kept, a row that is measured again replaces its older self, and the table is written
anew from all of them after each, so that a bench that is broken off leaves what it found.

    results = Results("lora", processor(), table)
    results.add("memory bf16", {"ratio": 0.5})
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer.machine import command_line

RESULTS = Path(__file__).parent.parent / "results"


class Results:
    """Rows by name, of one kind of machine. `table` makes lines of Markdown of all of them."""

    def __init__(
        self, bench: str, machine: Mapping[str, Any], table: Callable[[dict[str, Any]], list[str]], folder: Path | None = None
    ) -> None:
        self.machine, self.table = machine, table
        self.path = (RESULTS if folder is None else folder) / f"{bench}_{machine['kind']}.json"
        self.rows: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def add(self, row: str, found: Mapping[str, Any]) -> None:
        """Keep a row's figures with the command, the machine and the day."""
        stamp = {"command": command_line(), "machine": self.machine, "torch": version("torch"), "day": time.strftime("%Y-%m-%d")}
        self.rows[row] = {**found, **stamp}
        write_whole(self.path, json.dumps(self.rows, indent=1) + "\n")
        write_whole(self.path.with_suffix(".md"), self.text())

    def text(self) -> str:
        """The table, and below it where each row is from; rows of one command are one line."""
        by_source: dict[str, list[str]] = {}
        for row, one in self.rows.items():
            machine = one["machine"]
            flags, cores = ", ".join(machine["flags"]), f"{machine['load']:.2f} cores in use by others"
            source = f"{machine['name']} ({flags}; {cores}), {one['day']}, torch {one['torch']}: `{one['command']}`"
            by_source.setdefault(source, []).append(row)
        alone = len(by_source) == 1 and len(self.rows) > 1
        sources = [f"- {'all' if alone else '; '.join(rows)}: {source}" for source, rows in by_source.items()]
        return "\n".join([*self.table(self.rows), "", *sources]) + "\n"


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
