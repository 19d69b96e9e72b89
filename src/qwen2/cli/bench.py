"""`qwen2 bench`: prefill and decode speed by length, depth and number of streams, beside what this machine can do at most."""

from __future__ import annotations

import json
import statistics
import time
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from qwen2.cli.answer import working
from qwen2.cli.list import print_table
from qwen2.cli.pull import ensure
from qwen2.cli.run import check_model
from qwen2.weights.pull import human_size

if TYPE_CHECKING:
    from qwen2.engine.llm import LLM
    from qwen2.engine.speed import Ceilings

Numbers = Annotated[list[int] | None, Parameter(negative=(), consume_multiple=True)]
Row = dict[str, Any]


def bench(
    model: str,
    /,
    *,
    prompt: Numbers = None,
    depth: Numbers = None,
    streams: Numbers = None,
    tokens: int = 64,
    repeat: int = 3,
    threads: int | None = None,
    cache_bits: Literal[16, 8] = 16,
    isa: Literal["avx512", "avx2", "neon", "none"] | None = None,
    seed: int = 0,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Measure a model's speed. Prompts are random and new each time; figures are medians.

    Parameters
    ----------
    model
        A name, a folder or a file.
    prompt
        Lengths of prompts to read: 512 and 4096, where the window has room.
    depth
        Tokens that precede an answer: 0 and 4096.
    streams
        Answers written at once: 1 and 16. Behind each depth if both are given, otherwise behind the first; the others with one.
    tokens
        Steps of an answer.
    repeat
        How often each figure is measured.
    threads
        CPU threads; left out, as many as there are physical cores.
    cache_bits
        Bits of the keys and values.
    isa
        The kernels' instruction set; left out, the best that this processor has. With none torch computes, several times slower.
    seed
        Of the random prompts.
    json
        Print JSON instead of the table.
    """
    for name, values in (("prompt", prompt), ("streams", streams), ("tokens", [tokens]), ("repeat", [repeat])):
        if any(value < 1 for value in values or ()):
            raise ValueError(f"--{name} must be at least 1")
    if any(value < 0 for value in depth or ()):
        raise ValueError("--depth must be at least 0")
    check_model(model, [model])
    ensure(model)
    with working(f"loading {model}"):
        from qwen2.engine.llm import LLM

        begin = time.perf_counter()
        llm = LLM(model, threads=threads, isa=isa, cache_bits=cache_bits, max_batch=max(streams or [16]), guesses=0)
        load_seconds = time.perf_counter() - begin
    report = measure(llm, prompt, depth, streams, tokens, repeat, Random(seed))
    report = {"model": model, "format": llm.model.weight_format, "load_seconds": load_seconds} | about(llm, cache_bits) | report
    print_report(report, as_json=json)


def about(llm: LLM, cache_bits: int) -> Row:
    """The machine and the set of kernels."""
    import torch

    from qwen2 import __version__, kernels

    return {
        "qwen2": __version__,
        "processor": processor(),
        "flags": sorted(kernels.features()),
        "isa": kernels.isa_of(llm.engine.runner.lanes),
        "threads": kernels.threads() if llm.engine.runner.native else torch.get_num_threads(),
        "weight_bytes": llm.model.network.weight_bytes(),
        "cache_bits": cache_bits,
        "cache_bytes_per_token": llm.engine.runner.token_bytes,
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    import platform
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(
    llm: LLM, prompt: list[int] | None, depth: list[int] | None, streams: list[int] | None, tokens: int, repeat: int, random: Random
) -> Row:
    """All figures; lengths that were asked for must fit the window, our own are left out where they do not."""
    from qwen2 import kernels
    from qwen2.engine.speed import Ceilings, measure_decode, measure_prefill, multiplies_floats, room

    lengths = [length for length in (512, 4096) if length < llm.window] if prompt is None else prompt
    depths = [0, *(length for length in (4096,) if room(llm, length, 1, tokens) <= llm.window)] if depth is None else depth
    counts = [1, *(count for count in (16,) if room(llm, depths[0], count, tokens) <= llm.window)] if streams is None else streams
    every = depth is not None and streams is not None
    pairs = [(length, count) for length in depths for count in (counts if every or length == depths[0] else [1])]
    for length in lengths:
        if length >= llm.window:
            raise ValueError(f"--prompt {length:,} does not fit the window of {llm.window:,}; take less")
    for length, count in pairs:
        needed = room(llm, length, count, tokens)
        if needed > llm.window:
            asked = f"--depth {length:,} with --tokens {tokens:,} and --streams {count:,}"
            raise ValueError(f"{asked} needs {needed:,} tokens, the window is {llm.window:,}; take less of one")
    measure_prefill(llm, min(64, llm.window - 1), random)  # memory is there, threads are awake
    ceilings = Ceilings(floats=multiplies_floats(llm)) if kernels.isa() is not None else None
    prefills, decodes = [], []
    for length in lengths:
        with working(f"reading {length:,} tokens"):
            if ceilings is not None:
                ceilings.measure()
            runs = [measure_prefill(llm, length, random) for _ in range(repeat)]
        rates = [run.rate for run in runs]
        seconds = length / statistics.median(rates)
        prefills.append({"tokens": length, "rate": length / seconds, "rates": rates, "operations_per_second": runs[0].operations / seconds})
    for length, count in pairs:
        with working(f"writing {tokens} tokens, {count} streams at depth {length:,}"):
            written = []
            for _ in range(repeat):
                if ceilings is not None:
                    ceilings.measure()
                written.append(measure_decode(llm, length, count, tokens, random))
        outside = statistics.median(run.outside for run in written)
        rates = [run.rate for run in written]
        seconds = tokens * count / statistics.median(rates)
        row: Row = {"depth": length, "streams": count, "rate": tokens * count / seconds, "rates": rates}
        row |= {"bytes_per_second": written[0].nbytes / seconds, "operations_per_second": written[0].operations / seconds}
        decodes.append(row | {"share_outside_kernels": outside})
    return {"ceilings": _ceilings(ceilings), "prefill": prefills, "decode": decodes, "tokens": tokens, "repeat": repeat}


def _ceilings(found: Ceilings | None) -> Row | None:
    if found is None:
        return None
    of = "32-bit floats" if found.floats else "8-bit integers"
    return {"read_bytes_per_second": found.read, "operations_per_second": found.multiply, "operations_of": of, "reads": found.reads}


def print_report(report: Row, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=1))
        return
    kernel = f"kernels for {report['isa']}" if report["isa"] else "no kernels, torch computes"
    print(
        f"{report['model']}: {report['format']}, {human_size(report['weight_bytes'])} of weights, loaded in {report['load_seconds']:.1f} s"
    )
    print(f"{report['processor']}: {' '.join(report['flags'])}")
    print(f"{kernel}, {report['threads']} threads, cache of {report['cache_bits']} bits, {report['cache_bytes_per_token']:,} bytes a token")
    ceilings = report["ceilings"]
    if ceilings is not None:
        read, multiply = ceilings["read_bytes_per_second"], ceilings["operations_per_second"]
        print(f"this machine at most: {read / 1e9:.1f} GB/s read, {multiply / 1e9:.0f} GOP/s in products of {ceilings['operations_of']}\n")
    rows = [_shown(f"prefill {row['tokens']:,}", row, ceilings, None) for row in report["prefill"]]
    for row in report["decode"]:
        together = "" if row["streams"] == 1 else f", {row['streams']} streams"
        rows.append(_shown(f"decode at {row['depth']:,}{together}", row, ceilings, row["share_outside_kernels"]))
    print_table(rows)


def _shown(what: str, row: Row, ceilings: Row | None, outside: float | None) -> dict[str, str]:
    """A line of the table: of several streams both ceilings, since either may be what bounds them."""
    used, shares = [], []
    for key, unit in (("bytes_per_second", "GB/s"), ("operations_per_second", "GOP/s")):
        if key in row and (unit == "GB/s" or row.get("streams") != 1):
            digits = 1 if unit == "GB/s" else 0
            used.append(f"{row[key] / 1e9:.{digits}f} {unit}")
            shares.append("" if ceilings is None else f"{row[key] / ceilings['read_' * (unit == 'GB/s') + key]:.0%}")
    return {
        "what": what,
        "tok/s": f"{row['rate']:.1f}",
        "from - to": f"{min(row['rates']):.0f} - {max(row['rates']):.0f}",
        "used": ", ".join(used),
        "of the ceiling": ", ".join(filter(None, shares)),
        "outside kernels": "" if outside is None or ceilings is None else f"{outside:.1%}",
    }
