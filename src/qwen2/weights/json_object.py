"""Reading the small JSON files beside a checkpoint, whatever they hold."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB; ValueError or FileNotFoundError name the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; a Hugging Face folder has it beside the weights")
    if path.stat().st_size > 2**26:
        raise ValueError(f"{path}: {path.stat().st_size} bytes is no configuration file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return values
