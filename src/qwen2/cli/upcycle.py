"""`qwen2 upcycle`: a mixture of experts from a dense model, to be trained further."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qwen2.cli.answer import working
from qwen2.cli.pull import ensure
from qwen2.train.place import absolute, is_run, origin
from qwen2.train.saved import take
from qwen2.train.upcycle import Upcycling
from qwen2.train.upcycle import upcycle as make_mixture
from qwen2.weights.export import check_place, to_hf_folder
from qwen2.weights.pull import human_size

RECORD = "upcycling.json"


def upcycle(model: str, out: Path, /, *, how: Annotated[Upcycling | None, Parameter(name="*")] = None) -> None:
    """Make a mixture of experts from a dense model as the Qwen2 report describes: replicate, shuffle, cut, draw half anew.

    Parameters
    ----------
    model
        The dense model: a name, a folder or a file; also a training run or one of its checkpoints.
    out
        The Hugging Face folder to write, with upcycling.json, the record of how it was made.
    how
        The settings.
    """
    how = Upcycling() if how is None else how
    check_place(out, "folder")
    if not is_run(model):
        ensure(model)
    said: list[str] = []
    with working(f"loading {model}"):
        dense = take(model, said.append)
    for line in said:
        print(f"qwen2: {line}", file=sys.stderr)
    mixture = make_mixture(dense, how)
    with working(f"writing {out}"):
        to_hf_folder(mixture, out)
        record = {**origin(absolute(model), out), "settings": asdict(how), "parameters": mixture.config.parameters()}
        draft = out / f".{RECORD}.part"
        draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        draft.rename(out / RECORD)
    before, after, active = dense.config.parameters(), mixture.config.parameters(), mixture.config.active_parameters()
    if not how.scale:
        print("qwen2: weights were copied without --scale: the mixture's outputs are smaller than the dense model's", file=sys.stderr)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {after:,} parameters of {before:,}, {active:,} active for a token; {human_size(size)} written")
