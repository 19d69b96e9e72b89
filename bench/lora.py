"""Our LoRA steps beside trl's SFTTrainer with peft: tokens per second and peak memory; QLoRA's memory beside its file's size.

Each run is a process of its own, ours and theirs in turn, with the same shape, rows, rank, targets, optimizer and precision; figures are
medians over all timed steps. trl runs with its defaults, gradient checkpointing among them, and without it; the faster one counts for
speed, the smaller one for memory. Rows that are run alone are kept in the results' JSON file, and the table is written anew from all.

    python bench/lora.py [--peer-python PYTHON] [--rows speed-135m speed-0.5b memory qlora] [--precision bf16] [--rounds 2] [--steps 2]
    python bench/lora.py --rows memory --layers 3 6                           # where 24 layers do not fit: the line through both
    python bench/lora.py --rows qlora --file FILE.gguf                        # a Q4_K_M file of Qwen2.5 1.5B
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from peer.machine import processor
from peer.results import Results
from train import line_through

from qwen2.config import ModelConfig
from qwen2.config.family import FAMILY

HERE = Path(__file__).parent
ROWS = ("speed-135m", "speed-0.5b", "memory", "qlora")
HALF = replace(FAMILY["qwen2:0.5b"].config, dtype="float32")
SMALL = replace(HALF, hidden=576, layers=30, heads=9, kv_heads=3, ffn=1536, vocab=49152, bos=1, eos=(2,))  # SmolLM2-135M's shape
SHAPES = {"speed-135m": (SMALL, 4, 512), "speed-0.5b": (HALF, 4, 256)}
ASKED = {"speed": 1.3, "memory": 0.6, "qlora": 2.5}
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process, after one more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", help="memory: of these depths, and the line through the first and the last")
    parser.add_argument("--isa", choices=("avx512", "avx2", "neon"), help="our kernels' instruction set")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="the interpreter that has trl and peft")
    parser.add_argument("--file", type=Path, help="qlora: the GGUF file")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.threads, *(args.layers or [1])) < 1:
        parser.error("--rounds, --steps, --threads and --layers: at least 1")
    if "qlora" in args.rows and args.file is None:
        parser.error("--rows qlora: name the file with --file")
    results = Results("lora", processor(), table)
    for row in args.rows:
        result = memory(args) if row == "memory" else qlora(args) if row == "qlora" else speed(args, row)
        results.add(row if row == "qlora" else f"{row} {args.precision}", result)
    print(results.text())


def run(args: argparse.Namespace, program: str, **asked: Any) -> Any:
    """One process: what it printed last."""
    given = {"threads": args.threads, "isa": args.isa, "precision": args.precision, "rank": RANK, "dtype": "float32", **asked}
    python = args.peer_python if program == "trl_lora.py" else sys.executable
    done = subprocess.run([python, str(HERE / "peer" / program), json.dumps(given)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{program} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def both(args: argparse.Namespace, config: ModelConfig, batch: int, length: int, steps: int, warmup: int) -> dict[str, Any]:
    """Ours, keeping all and recomputing layers, and theirs likewise."""
    shape = {"config": config.to_hf(), "batch": batch, "length": length, "steps": steps, "warmup": warmup}
    return {
        "ours": run(args, "own_lora.py", recompute="none", **shape),
        "theirs, checkpointing": run(args, "trl_lora.py", checkpointing=True, **shape),
        "ours, recompute layers": run(args, "own_lora.py", recompute="layers", **shape),
        "theirs": run(args, "trl_lora.py", checkpointing=False, **shape),
    }


def speed(args: argparse.Namespace, row: str) -> dict[str, Any]:
    """All four in turn, as many rounds as are asked for."""
    config, batch, length = SHAPES[row]
    seconds: dict[str, list[float]] = {}
    version = ""
    for _ in range(args.rounds):
        for name, found in both(args, config, batch, length, args.steps, 1).items():
            seconds.setdefault(name, []).extend(found["seconds"])
            version = found["version"] if name == "theirs" else version
    tokens = {name: batch * length / median(times) for name, times in seconds.items()}
    ratio = tokens["ours"] / max(tokens["theirs"], tokens["theirs, checkpointing"])
    return {
        "tokens": tokens,
        "ratio": ratio,
        "version": version,
        "rounds": args.rounds,
        "steps": args.steps,
        "shape": f"{batch} x {length}",
    }


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """0.5B, 4 x 1,024 tokens: the first step's peak less the base's weights."""
    depths = args.layers or [HALF.layers]
    above: dict[str, list[float]] = {}
    for layers in depths:
        for name, found in both(args, replace(HALF, layers=layers), 4, 1024, 1, 0).items():
            above.setdefault(name, []).append(found["peak"] - found["weights"])
    at = {name: line_through(depths, values, HALF.layers) for name, values in above.items()}
    ratio = min(at["ours"], at["ours, recompute layers"]) / min(at["theirs"], at["theirs, checkpointing"])
    return {"layers": depths, "above": above, "at": at, "ratio": ratio}


def qlora(args: argparse.Namespace) -> dict[str, Any]:
    """A whole process that trains adapters on a file's packed weights, 1 x 1,024 tokens: its peak beside the file's size."""
    found = run(args, "own_lora.py", file=str(args.file), recompute="layers", batch=1, length=1024, steps=2, warmup=1)
    size = args.file.stat().st_size
    return {
        "peak": found["whole"],
        "size": size,
        "ratio": found["whole"] / size,
        "tokens": 1024 / median(found["seconds"]),
        "file": args.file.name,
    }


def table(kept: dict[str, Any]) -> list[str]:
    """All rows there are, as lines of Markdown."""
    lines = ["# LoRA steps beside trl and peft", ""]
    lines += ["| | qwen2 | compared with | ratio | asked |", "|---|---|---|---|---|"]
    for row, r in kept.items():
        name, _, precision = row.partition(" ")
        if name.startswith("speed"):
            t = r["tokens"]
            ours = f"{t['ours']:,.0f}; {t['ours, recompute layers']:,.0f} recomputing layers"
            theirs = f"{t['theirs, checkpointing']:,.0f} with its checkpointing, {t['theirs']:,.0f} without; {r['version']}"
            what = f"LoRA, {name.partition('-')[2]}, {r['shape']}, {precision}, tokens/s"
            lines.append(f"| {what} | {ours} | {theirs} | {r['ratio']:.2f} | {ASKED['speed']} |")
        elif name == "memory":
            at = {key: value / 2**30 for key, value in r["at"].items()}
            ours = f"{at['ours, recompute layers']:.2f} recomputing layers, {at['ours']:.2f}"
            theirs = f"{at['theirs, checkpointing']:.2f} with its checkpointing, {at['theirs']:.2f} without"
            by = f", by the line through {r['layers'][0]} and {r['layers'][-1]} layers" if len(r["layers"]) > 1 else ""
            what = f"LoRA, 0.5b, 4 x 1,024, {precision}: peak above the weights, GiB{by}"
            lines.append(f"| {what} | {ours} | {theirs} | {r['ratio']:.2f} | at most {ASKED['memory']} |")
        else:
            ours, size = f"{r['peak'] / 1e9:.2f} GB ({r['tokens']:,.0f} tokens/s)", f"{r['size'] / 1e9:.2f} GB"
            lines.append(
                f"| QLoRA on {r['file']}, 1 x 1,024: peak in all | {ours} | {size} | {r['ratio']:.2f} | at most {ASKED['qlora']} |"
            )
    return lines


if __name__ == "__main__":
    main()
