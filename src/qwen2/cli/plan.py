"""`qwen2 plan`: what training a model on many GPUs takes, counted from its config: memory, traffic and step time of each layout."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from qwen2.cli.list import print_table

if TYPE_CHECKING:
    from qwen2.config import ModelConfig
    from qwen2.train.plan import Job, Plan

SHOWN = 12  # layouts in the table
UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def plan(
    model: str,
    /,
    *,
    gpus: int,
    memory: str | None = None,
    gpu: str = "h100",
    sequence: int = 4096,
    batch_tokens: str = "4Mi",
    gpus_per_node: int = 8,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Plan a training run: each division of the GPUs with its memory, traffic and step time, and which to take. No GPU is needed.

    Where none fits the exit code is 1.

    Parameters
    ----------
    model
        A published name, a Hugging Face folder or a config.json.
    gpus
        How many there are in all.
    memory
        What one may use, as in 80GiB or 72GB; left out, all it has.
    gpu
        a100, h100 or h200.
    sequence
        Tokens of a sequence.
    batch_tokens
        Tokens of a step, as in 4Mi or 2097152.
    gpus_per_node
        GPUs that share the fast links.
    json_
        As JSON, all layouts.
    """
    from qwen2.train.hardware import GPUS, gpu_named
    from qwen2.train.plan import Job, plans

    room = None if memory is None else number("--memory", memory, "B")
    if room is not None and room > gpu_named(gpu).memory:
        have = ", ".join(f"{name} {one.memory / (1 << 30):.4g} GiB" for name, one in GPUS.items())
        raise ValueError(
            f"--memory {memory}: {gpu} has {gpu_named(gpu).memory / (1 << 30):.4g} GiB; give at most that, or another --gpu: {have}"
        )
    tokens = number("--batch-tokens", batch_tokens)
    job = Job(config_of(model), gpus, gpu_named(gpu), room, sequence, tokens, gpus_per_node)
    found = plans(job)
    if json_:
        print(json.dumps({"model": model, "gpus": gpus, "gpu": gpu, "layouts": [facts(one) for one in found]}, indent=1))
    else:
        print_plans(model, gpu, job, found)
    return 0 if any(one.fits for one in found) else 1


def number(flag: str, text: str, unit: str = "") -> int:
    """A whole number with a decimal (k, M, G, T) or binary (Ki, Mi, Gi, Ti) prefix. Raises ValueError naming the flag."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*([kKMGT]?i?)(?:{unit})?", text.strip())
    value = float(match[1]) * UNITS[match[2]] if match and match[2] in UNITS else 0.0
    if value < 1 or value != int(value):
        raise ValueError(f"{flag} {text}: write a whole number above 0, also with a prefix, as in 4Mi{unit} or 4M{unit}")
    return int(value)


def config_of(model: str) -> ModelConfig:
    """The config of a published name, a folder or a config.json. Raises ValueError or FileNotFoundError."""
    from qwen2.config import FAMILY, ModelConfig
    from qwen2.weights.json_object import read_json

    path = Path(model)
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        return ModelConfig.from_hf(read_json(file), str(file))
    return FAMILY[published(model)].config


def published(model: str) -> str:
    """The family's name of a published model. Raises ValueError where there is none."""
    from qwen2.config import FAMILY
    from qwen2.weights.names import parse
    from qwen2.weights.registry import by_repository, canonical

    name = str(by_repository(model) or canonical(parse(model)))
    if name not in FAMILY:
        raise ValueError(f"{model}: no published model of that name has a plan: {', '.join(FAMILY)}; or give a folder or a config.json")
    return name


def facts(one: Plan) -> dict[str, Any]:
    """Everything known of a layout: bytes on one GPU, bytes of a step in and out of one GPU, seconds, what of it is unverified and why."""
    layout, traffic = one.layout, one.traffic
    return {
        "data": layout.data,
        "context": layout.context,
        "expert": layout.expert,
        "tensor": layout.tensor,
        "micro_batch": one.micro,
        "micro_batches": one.micro_batches,
        "recompute": one.recompute,
        "fits": one.fits,
        "unverified": one.unverified,
        "memory": {
            "all": one.memory,
            "weights": one.weights,
            "gradients": one.gradients,
            "optimizer": one.optimizer,
            "activations": one.activations,
            "buffers": one.buffers,
        },
        "traffic": {"link": traffic.link, "network": traffic.network},
        "step_seconds": one.step,
        "tokens_per_second": one.tokens_per_second,
        "utilisation": one.utilisation,
    }


def print_plans(model: str, gpu: str, job: Job, found: list[Plan]) -> None:
    """The fastest that fit as a table, what does not fit in a line, and the one to take."""
    gib = job.room / (1 << 30)
    print(f"{model}: {job.config.parameters():,} parameters on {job.gpus:,} GPUs ({gpu}, {gib:.4g} GiB, {job.node} a node)")
    print(f"a step: {job.batch_tokens:,} tokens in {job.sequences:,} sequences; GiB on a GPU, GB in and out of a GPU a step\n")
    fitting = [one for one in found if one.fits]
    shown = (fitting or found)[:SHOWN]
    print_table([row(one) for one in shown])
    print()
    if len(fitting) > len(shown):
        print(f"{len(fitting) - len(shown)} slower layouts are not shown (--json has all)")
    if rest := [one for one in found if not one.fits]:
        smallest = rest[0]
        print(f"{len(rest)} of {len(found)} layouts do not fit; the smallest of them takes {smallest.memory / (1 << 30):.0f} GiB")
    if doubts := {what: why for one in shown for what, why in one.unverified.items()}:
        reasons = "; ".join(f"{what} ({why})" for what, why in doubts.items())
        print(f"unverified, and on the fast side: layouts with {reasons}; see docs/scale.md")
    print(verdict(model, job, fitting))


def verdict(model: str, job: Job, fitting: list[Plan]) -> str:
    """The layout to take, and the command that starts it."""
    if not fitting:
        return f"none fits: give more GPUs than {job.gpus:,}, more --memory or shorter sequences"
    one = fitting[0]
    again = ", layers recomputed" if one.recompute else ""
    return f"take {one.layout}, {one.micro} sequences at a time{again}: {one.step:.3g} s a step\n{command(model, job, one)}"


def command(model: str, job: Job, one: Plan) -> str:
    """The command line that starts a layout, on every node where there are several: new weights from SHARDS into RUN."""
    nodes, gpus = max(1, job.gpus // job.node), min(job.gpus, job.node)
    start = f"torchrun --nproc-per-node {gpus}"
    several = ""
    if nodes > 1:
        several = f"on each of the {nodes} nodes, FIRST being the name of one of them:\n"
        start = f"torchrun --nnodes {nodes} --nproc-per-node {gpus} --rdzv-backend c10d --rdzv-endpoint FIRST:29500"
    flags = " ".join(f"--{kind}-parallel {getattr(one.layout, kind)}" for kind in ("data", "context", "expert", "tensor"))
    rows = f"--length {job.sequence} --batch {job.sequences} --micro-batch {one.micro} --recompute {'layers' if one.recompute else 'none'}"
    lines = (f"{start} -m qwen2 pretrain SHARDS --out RUN {shape_flag(model)} --device cuda", flags, rows)
    return several + "  " + " \\\n    ".join(lines)


def shape_flag(model: str) -> str:
    """What names a model's shape to `qwen2 pretrain`: its size, or the config that was given."""
    path = Path(model)
    if path.is_dir() or path.suffix == ".json":
        return f"--config {shlex.quote(str(path / 'config.json' if path.is_dir() else path))}"
    return f"--size {published(model).partition(':')[2].removesuffix('-base')}"


def row(one: Plan) -> dict[str, str]:
    """A line of the table."""
    gib = {name: f"{value / (1 << 30):.1f}" for name, value in facts(one)["memory"].items()}
    return {
        "layout": str(one.layout),
        "at a time": str(one.micro),
        "recompute": "yes" if one.recompute else "no",
        "memory": gib.pop("all"),
        **gib,
        "nvlink": f"{one.traffic.link / 1e9:.0f}",
        "network": f"{one.traffic.network / 1e9:.0f}",
        "step": f"{one.step:.3g} s",
        "tokens/s": f"{one.tokens_per_second:,.0f}",
        "MFU": f"{one.utilisation:.0%}",
    }
