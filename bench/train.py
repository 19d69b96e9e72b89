"""Our training loop beside transformers' Trainer: tokens per second, FLOPs utilisation, peak memory, a mixture beside a dense model.

Each run is a process of its own, ours and theirs in turn, with the same config, batch, optimizer, clipping and precision; figures are
medians over all timed steps. Utilisation is 6 N tokens/s (N active parameters, attention's own products not counted) by the rate of a
product of 2,048-wide matrices that a third process measures in every round, torch's or oneDNN's, whichever is higher. Rows that are
run alone are kept in the results' JSON file, and the table is written anew from all of them.

    python bench/train.py --rows fp32 bf16 memory moe-fp32 moe-bf16 [--rounds 3] [--steps 4] [--peer-python PYTHON]
    python bench/train.py --rows memory --layers 4 8                  # where 24 layers do not fit: both, and the line through them
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

from qwen2.config import ModelConfig, MoEConfig
from qwen2.config.family import FAMILY, nano

HERE = Path(__file__).parent
ROWS = ("fp32", "bf16", "memory", "moe-fp32", "moe-bf16")
MOE = MoEConfig(experts=16, active=4, expert_ffn=256, shared_ffn=1024)  # the proportions of Qwen2-57B-A14B
ASKED = {"ratio": 1.3, "fp32": 0.7, "bf16": 0.6, "memory": 0.6, "moe": 0.7}
RATE = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[2]))
dtype, side = {"fp32": torch.float32, "bf16": torch.bfloat16}[sys.argv[1]], 2048
a, b, out = (torch.randn(side, side).to(dtype) for _ in range(3))
def rate(work):
    times = []
    for _ in range(12):
        start = time.perf_counter(); work(); times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)
found = {"torch": rate(lambda: torch.mm(a, b, out=out))}
if torch.backends.mkldnn.is_available():
    found["oneDNN"] = rate(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a process, after two more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", help="memory: of these depths, and the line through the first and the last")
    parser.add_argument("--isa", choices=("avx512", "avx2", "neon"), help="our kernels' instruction set")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="the interpreter that has transformers")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.threads, *(args.layers or [1])) < 1:
        parser.error("--rounds, --steps, --threads and --layers: at least 1")
    results = Results("train", processor(), table)
    for row in args.rows:
        result = memory(args) if row == "memory" else mixture(args, row[4:]) if row.startswith("moe") else speed(args, row)
        results.add(row, result)
    print(results.text())


def run(
    args: argparse.Namespace, program: str, config: ModelConfig, batch: int, length: int, precision: str, steps: int, warmup: int
) -> Any:
    """One process: what it printed last."""
    asked = {"config": config.to_hf(), "batch": batch, "length": length, "precision": precision, "steps": steps, "warmup": warmup}
    asked |= {"threads": args.threads, "isa": args.isa}
    python = args.peer_python if program == "trainer.py" else sys.executable
    return _json([python, str(HERE / "peer" / program), json.dumps(asked)])


def _json(command: list[str]) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:2])} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def product_rate(args: argparse.Namespace, precision: str) -> float:
    found: dict[str, float] = _json([sys.executable, "-c", RATE, precision, str(args.threads)])
    return max(found.values())


def speed(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Nano, batch 8 x 512, in turn."""
    config, batch, length = nano(), 8, 512
    ours, theirs, rates, version = [], [], [], ""
    for _ in range(args.rounds):
        rates.append(product_rate(args, precision))
        ours += run(args, "own_step.py", config, batch, length, precision, args.steps, 2)["seconds"]
        peer = run(args, "trainer.py", config, batch, length, precision, args.steps, 2)
        theirs += peer["seconds"]
        version = peer["version"]
    tokens = batch * length / median(ours)
    flops = 6 * config.parameters(active_only=True) * tokens
    return {
        "ours": tokens, "theirs": batch * length / median(theirs), "flops": flops, "rate": median(rates),
        "used": flops / median(rates), "version": version, "rounds": args.rounds, "steps": args.steps,
    }  # fmt: skip


def mixture(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """The mixture of experts beside our dense nano: tokens per second times active parameters."""
    configs = {"dense": nano(), "mixture": nano(moe=MOE)}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(args.rounds):
        for name, config in configs.items():
            seconds[name] += run(args, "own_step.py", config, 8, 512, precision, args.steps, 2)["seconds"]
    found = {name: 4096 / median(times) for name, times in seconds.items()}
    flops = {name: 6 * configs[name].parameters(active_only=True) * rate for name, rate in found.items()}
    return {"tokens": found, "flops": flops, "ratio": flops["mixture"] / flops["dense"], "rounds": args.rounds, "steps": args.steps}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """0.5B, 4 x 1,024 tokens, fp32: the first step's peak less weights; the optimizer has no state before its end, when the
    activations are gone."""
    whole = replace(FAMILY["qwen2:0.5b"].config, dtype="float32")
    depths = args.layers or [whole.layers]
    above: dict[str, list[float]] = {"ours": [], "theirs": []}
    for layers in depths:
        for name, program in (("ours", "own_step.py"), ("theirs", "trainer.py")):
            found = run(args, program, replace(whole, layers=layers), 4, 1024, "fp32", 1, 0)
            above[name].append(found["peak"] - 4 * found["weights"])
    at = {name: line_through(depths, values, whole.layers) for name, values in above.items()}
    return {"layers": depths, "above": above, "ours": at["ours"], "theirs": at["theirs"], "ratio": at["ours"] / at["theirs"]}


def line_through(depths: list[int], values: list[float], layers: int) -> float:
    if depths[-1] == depths[0]:
        return values[0]
    return values[0] + (values[-1] - values[0]) * (layers - depths[0]) / (depths[-1] - depths[0])


def table(kept: dict[str, Any]) -> list[str]:
    """All rows there are, as lines of Markdown."""
    lines = ["# A training step beside transformers' Trainer", ""]
    lines += ["| | qwen2 | compared with | ratio | asked |", "|---|---|---|---|---|"]
    for row in ("fp32", "bf16"):
        if (r := kept.get(row)) is not None:
            lines.append(
                f"| nano, 8 x 512, {row}, tokens/s | {r['ours']:,.0f} | {r['theirs']:,.0f}, Trainer of transformers {r['version']} "
                f"| {r['ours'] / r['theirs']:.2f} | {ASKED['ratio']} |"
            )
            rate = f"{r['rate'] / 1e9:.0f}, the matrix product"
            lines.append(f"| 6 N tokens/s, {row}, GFLOP/s | {r['flops'] / 1e9:.0f} | {rate} | {r['used']:.0%} | {ASKED[row]:.0%} |")
    if (r := kept.get("memory")) is not None:
        what = "0.5B, fp32, 4 x 1,024: peak above weights and optimizer state, GiB"
        if len(r["layers"]) > 1:
            what += f", by the line through {r['layers'][0]} and {r['layers'][-1]} layers"
        values = f"{r['ours'] / 2**30:.1f} | {r['theirs'] / 2**30:.1f}, Trainer | {r['ratio']:.2f}"
        lines.append(f"| {what} | {values} | at most {ASKED['memory']} |")
    for row in ("moe-fp32", "moe-bf16"):
        if (r := kept.get(row)) is not None:
            what = f"nano with 16 experts, 4 active, {row[4:]}: 6 N_active tokens/s, GFLOP/s"
            ours = f"{r['flops']['mixture'] / 1e9:.0f} ({r['tokens']['mixture']:,.0f} tokens/s)"
            lines.append(f"| {what} | {ours} | {r['flops']['dense'] / 1e9:.0f}, our dense nano | {r['ratio']:.2f} | {ASKED['moe']} |")
    return lines


if __name__ == "__main__":
    main()
