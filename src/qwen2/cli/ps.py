"""`qwen2 ps`: the models that a running server has in memory."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Annotated

from cyclopts import Parameter

from qwen2.cli.client import Address, ask
from qwen2.cli.list import print_table
from qwen2.weights.pull import human_size


def ps(*, at: Address = None, json_: Annotated[bool, Parameter(name="--json", negative=())] = False) -> None:
    """Show which models a server has in memory, where, and for how long.

    Parameters
    ----------
    at
        The server, as host:port or a URL; left out, QWEN2_SERVER or 127.0.0.1:11434.
    json_
        Print JSON.
    """
    models = ask(at, "GET", "/api/ps")["models"]
    if json_:
        print(json.dumps(models, indent=2))
    elif not models:
        print("no model is in memory")
    else:
        print_table([_row(model) for model in models])


def _row(model: dict[str, object]) -> dict[str, str]:
    expires = model["expires_at"]
    stays = "in use" if model["in_use"] else "for good"
    left = stays if expires is None else f"{_seconds_left(str(expires)):.0f} s more"
    return {
        "name": str(model["name"]),
        "size": human_size(int(str(model["size"]))) + (", shared" if model["shares"] else ""),
        "device": str(model["device"]),
        "context": f"{model['context_length']:,}",
        "stays": left,
    }


def _seconds_left(when: str) -> float:
    return (datetime.fromisoformat(when) - datetime.now(timezone.utc)).total_seconds()
