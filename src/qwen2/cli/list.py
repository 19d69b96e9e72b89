"""`qwen2 list`: the models that are here, or every name that can be pulled."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qwen2.weights.pull import human_size
from qwen2.weights.registry import DEFAULT_MODEL, ENTRIES
from qwen2.weights.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2.weights.registry import Entry


def list_models(
    *,
    all_: Annotated[bool, Parameter(name="--all", negative=())] = False,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """List the models that are here.

    Parameters
    ----------
    all_
        Every name that qwen2 pull knows, with its licence and its name on the hubs.
    json_
        As JSON, sizes in bytes.
    """
    rows = _published() if all_ else _stored()
    if json_:
        print(json.dumps(rows, indent=2))
    elif rows:
        hidden = () if all_ else ("licence", "sha256", "path", "gone")
        for row in rows:
            if row.get("gone"):
                row["source"] = f"{row['source']} (gone)"
        print_table([{key: _cell(value) for key, value in row.items() if key not in hidden} for row in rows])
    else:
        print(f"no models here yet: qwen2 pull {DEFAULT_MODEL} gets the default one, qwen2 list --all shows every name")


def _stored() -> list[dict[str, object]]:
    return [
        {
            "name": model.name,
            "size": model.size,
            "format": model.format,
            "pulled": model.pulled[:10],
            "source": model.source,
            "licence": model.licence,
            "sha256": model.digest,
            "path": str(model.path),
            "gone": model.gone,
        }
        for model in Store().list(_say)
    ]


def _say(damaged: ValueError) -> None:
    print(f"qwen2: {damaged}", file=sys.stderr)


def _published() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for entry in ENTRIES.values():
        rows.append({"name": entry.name, "format": entry.format, "licence": entry.licence, "where": places(entry)})
    return rows


def places(entry: Entry) -> str:
    """Where a published model is to be had."""
    where = [entry.repository] if entry.repository is not None else []
    where += ["package index"] if entry.known is not None and entry.known.parts else []
    return ", ".join(where)


def _cell(value: object) -> str:
    return human_size(value) if isinstance(value, int) else str(value)


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Columns as wide as their longest cell, the keys as their heads."""
    table = [[key.upper() for key in rows[0]], *([*row.values()] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
