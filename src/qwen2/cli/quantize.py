"""`qwen2 quantize`: a GGUF file of 2 to 8 bits a weight, which llama.cpp loads too; --dry-run shows what it would hold."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from cyclopts import Parameter

from qwen2.cli.list import print_table
from qwen2.cli.pull import ensure
from qwen2.weights.pull import human_size
from qwen2.weights.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from qwen2.weights.gguf_write import TensorToWrite
    from qwen2.weights.quantize import Plan

Mix = Literal[
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "iq4_nl", "q4_k_s", "q4_k_m",
    "q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "q8_0", "f16", "bf16", "f32",
]  # fmt: skip


def any_case(_: Any, tokens: Sequence[Any]) -> str:
    """A mix as it is written here or, as other tools write it, in capitals."""
    name = str(tokens[0].value).lower()
    if name not in get_args(Mix):
        raise ValueError(f"{tokens[0].value!r}: there are {', '.join(get_args(Mix))}")
    return name


def quantize(
    model: str,
    destination: Path | None = None,
    /,
    *,
    to: Annotated[Mix, Parameter(converter=any_case)],
    threads: int | None = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Make a GGUF file whose weights take fewer bits.

    Parameters
    ----------
    model
        A name, a folder or a file; best one of F16 or BF16 weights.
    destination
        The file to write, which must not exist yet. Left out: the model's name and the type, in this folder.
    to
        The mix: q4_k_m is the usual one, q8_0 hardly loses anything, q2_k is the smallest. Where the mix ends in _m or _l, the
        matrices that suffer most get more bits.
    threads
        CPU threads; left out, as many as there are physical cores.
    dry_run
        Show each tensor's type, bits a weight and the reason, and write nothing.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads}: must be at least 1")
    if not dry_run:
        ensure(model)
    path, name, hold = Store().open(model)
    _say_what_stays(model)
    with hold if hold is not None else nullcontext():
        place = destination if destination is not None else Path(f"{_plain(name)}-{to}.gguf")
        if place.exists():
            if not dry_run:
                raise FileExistsError(f"{place}: exists already; name another file to write")
            print(f"qwen2: {place} exists already, without --dry-run it would not be written over; name another file", file=sys.stderr)
        if dry_run and not place.absolute().parent.is_dir():
            print(f"qwen2: {place.absolute().parent}: no such folder; without --dry-run nothing could be written there", file=sys.stderr)

        import torch

        from qwen2 import kernels
        from qwen2.weights.quantize import open_plan

        kernels.set_threads(threads)
        if threads is not None:
            torch.set_num_threads(threads)  # what torch does, and how many pieces are worked on at once
        with open_plan(path, to, name) as plan:
            for note in plan.notes:
                print(f"qwen2: {note}", file=sys.stderr)
            if dry_run:
                _show(plan)
                return
            start = time.monotonic()
            with _bar(plan) as watch:
                plan.write(place, watch)
            print(
                f"{place}: {human_size(place.stat().st_size)} written in {time.monotonic() - start:.0f} s, {_bits(plan):.2f} bits a weight"
            )


def _say_what_stays(model: str) -> None:
    store = Store()
    if not store.is_path(model) and store.get(model).adapter:
        merged = f"qwen2 export {model} FOLDER merges it, then quantize FOLDER; or keep it beside smaller weights: qwen2 create --quantize"
        raise ValueError(f"{model} has an adapter, which no file of smaller weights would have: {merged}")
    if not store.is_path(model) and store.get(model).made:
        print(f"qwen2: the Modelfile of {model} is no part of the file; qwen2 create --quantize keeps it", file=sys.stderr)


def _plain(name: str) -> str:
    """A model's name as a file's: without its folder, its ending and its colon."""
    return Path(name.rstrip("/\\")).name.removesuffix(".gguf").replace(":", "-")


def _bits(plan: Plan) -> float:
    return plan.nbytes * 8 / plan.weights


def _show(plan: Plan) -> None:
    rows = []
    for tensor in plan.tensors:
        rows.append(
            {
                "tensor": tensor.name,
                "shape": " x ".join(map(str, tensor.shape)),
                "type": tensor.choice.type,
                "bits": f"{tensor.nbytes * 8 / prod(tensor.shape):.4g}",
                "size": human_size(tensor.nbytes),
                "reason": tensor.choice.reason,
            }
        )
    print_table(rows)
    shares: dict[str, list[int]] = {}
    for tensor in plan.tensors:
        share = shares.setdefault(tensor.choice.type, [0, 0])
        share[0] += 1
        share[1] += tensor.nbytes
    for form, (count, size) in sorted(shares.items(), key=lambda item: -item[1][1]):
        print(f"{form}: {count} tensors, {human_size(size)}")
    print(f"in all: {len(plan.tensors)} tensors, {human_size(plan.nbytes)}, {_bits(plan):.2f} bits a weight")


@contextmanager
def _bar(plan: Plan) -> Iterator[Callable[[TensorToWrite], None] | None]:
    """A bar on stderr where that is a terminal, over the weights that are packed."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=plan.weights)
        yield lambda tensor: bars.update(task, advance=prod(tensor.shape), description=tensor.name)
