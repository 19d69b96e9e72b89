"""`qwen2 budget`: what this machine can train in the time there is, as a model's config and the flags of each stage."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

STAGE = re.compile(r"(?P<name>[A-Za-z][\w-]*)=(?P<length>\d+)x(?P<batch>\d+):(?P<share>[\d.]+)(@(?P<theta>[\d.]+))?")


def budget(
    shards: Path,
    /,
    *,
    out: Path,
    seconds: float,
    size: str | None = None,
    ratio: float = 4.0,
    stage: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    tokenizer: Path | None = None,
    trial: float = 5.0,
) -> None:
    """Measure how fast this machine trains, and choose a model and its steps for the time there is.

    Parameters
    ----------
    shards
        The folder that qwen2 data wrote.
    out
        The folder to write: budget.json, config.json (the model) and for each stage NAME.flags, for qwen2 pretrain.
    seconds
        How long all stages together may train.
    size
        The model, by name; left out, the largest that gets enough tokens.
    ratio
        Tokens a parameter that a model should get.
    stage
        NAME=LENGTHxBATCH:SHARE@BASE, as in long=2048x2:0.2@1000000; may be repeated. Left out, a short and a long one.
    tokenizer
        The tokenizer's folder; left out, SHARDS/tokenizer.
    trial
        Seconds for which each stage is tried.
    """
    from qwen2.data.shards import Shards
    from qwen2.tokenizer import Tokenizer
    from qwen2.train.budget import STAGES, make_budget

    if out.exists():
        raise FileExistsError(f"{out}: exists already; write the budget into a new folder")
    stages = tuple(map(_stage, stage)) if stage else STAGES
    opened = Shards.open(shards, verify=False)
    plan = make_budget(opened, Tokenizer.from_folder(tokenizer or shards / "tokenizer"), seconds, stages, size, ratio, trial)
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    draft.mkdir(parents=True)
    try:
        (draft / "budget.json").write_text(json.dumps(plan.to_json(), indent=2) + "\n", encoding="utf-8")
        (draft / "config.json").write_text(json.dumps(plan.config.to_hf(), indent=2) + "\n", encoding="utf-8")
        for name, planned in plan.stages.items():
            one = planned.stage
            flags = f"--steps {planned.steps} --length {one.length} --batch {one.batch} --rope-theta {one.rope_theta:.0f}"
            (draft / f"{name}.flags").write_text(f"{flags} --micro-batch {one.batch}\n", encoding="utf-8")
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print("\n".join(plan.lines()))


def _stage(text: str):  # type: ignore[no-untyped-def]  # the class comes with torch
    from qwen2.train.budget import Stage

    match = STAGE.fullmatch(text)
    if match is None:
        raise ValueError(f"stage {text!r}: write NAME=LENGTHxBATCH:SHARE@BASE, as in long=2048x2:0.2@1000000")
    theta = 10_000.0 if match["theta"] is None else float(match["theta"])
    return Stage(match["name"], int(match["length"]), int(match["batch"]), float(match["share"]), theta)
