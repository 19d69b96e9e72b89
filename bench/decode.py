"""Decoding of every block format: beside llama.cpp on the same file, and beside what this machine can read.

A model is written out in each format by `qwen2 quantize`; both engines decode from an empty cache, alternating, and ours also behind
4,096 tokens. The read ceiling is measured before every round. Formats in blocks of 256 need rows of whole blocks, which the 0.5B does not
have: they are made of --large. Left out: prompts and several streams (peers.py), and what a format loses (formats.py).

    python bench/decode.py --llama-cpp VENV/bin/python [--formats q4_0,q6_k] [--isa avx2] [--out FILE]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from peer.machine import command_line, processor, read_ceiling
from peer.process import interpreter
from peers import VARIANTS, Bench, describe

SMALL = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q4_k_m")
LARGE = ("q2_k", "q3_k_s", "q4_k_s", "q5_k_s", "q6_k")
DEPTH = 4096
ENGINES = ("ours", "llama.cpp")
HEADS = ("format", "ours, tok/s", "llama.cpp, tok/s", "ours / llama.cpp", "of the ceiling", f"ours at {DEPTH:,}, tok/s", "of the ceiling")


def measure(args: argparse.Namespace, path: Path) -> dict[str, float]:
    """One file's medians: speeds of both engines, and the share of the highest read ceiling that was seen meanwhile."""
    bench = Bench(args, describe(str(path), DEPTH + args.tokens + 64))
    weights, position = bench.model["weight_bytes"], bench.model["cache_bytes"]
    if weights is None:
        raise SystemExit(f"{args.small}, {args.large}: a token reads a part of a mixture of experts; take dense models, or bench/moe.py")
    found: dict[str, list[float]] = defaultdict(list)
    bench.warm(list(ENGINES))
    for number in range(args.rounds):
        found["ceiling"].append(read_ceiling(args.threads))
        for engine in ENGINES if number % 2 else ENGINES[::-1]:
            for variant in VARIANTS.get(engine, ("",)):
                answer = bench.ask(engine, "measure", ids=bench.ids(1), tokens=args.tokens, variant=variant)
                found[engine + variant].append(args.tokens / answer["decode"])
        answer = bench.ask("ours", "measure", ids=bench.ids(DEPTH), tokens=args.tokens, variant="")
        found["deep"].append(args.tokens / answer["decode"])
    for worker in bench.workers.values():
        worker.close()
    middle = {name: median(values) for name, values in found.items()}
    middle["share"] = middle["ours"] * weights / max(found["ceiling"])
    middle["deep share"] = middle["deep"] * (weights + DEPTH * position) / max(found["ceiling"])
    return {**middle, "llama.cpp": max(middle[f"llama.cpp{variant}"] for variant in VARIANTS["llama.cpp"])}


def row(name: str, m: Mapping[str, float]) -> str:
    cells = [name, f"{m['ours']:.1f}", f"{m['llama.cpp']:.1f}", f"{m['ours'] / m['llama.cpp']:.2f}"]
    cells += [f"{m['share']:.0%}", f"{m['deep']:.1f}", f"{m['deep share']:.0%}"]
    return f"| {' | '.join(cells)} |"


def made(source: str, mix: str, folder: Path) -> Path:
    """The file in this format. SystemExit where it cannot be made."""
    path = folder / f"{mix}.gguf"
    command = [sys.executable, "-m", "qwen2", "quantize", source, str(path), "--to", mix]
    if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        raise SystemExit(f"{source}: making {mix} of it failed; see: qwen2 quantize {source} {path} --to {mix}")
    return path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", default="qwen2.5-coder:0.5b", help=f"what {', '.join(SMALL)} are made of: a name, a folder or a file")
    parser.add_argument("--large", default="qwen2.5-coder:1.5b", help=f"what {', '.join(LARGE)} are made of")
    parser.add_argument("--formats", type=lambda text: text.lower().split(","), default=[*SMALL, *LARGE])
    parser.add_argument("--llama-cpp", metavar="PATH", required=True, help="a Python that has llama_cpp, or a build folder of llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--isa", choices=("avx2", "avx512"), help="hold both engines to it (llama.cpp must be built so)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table, in Markdown, as well as on stdout")
    args = parser.parse_args()
    unknown = [name for name in args.formats if name not in (*SMALL, *LARGE)]
    if unknown:
        parser.error(f"--formats {unknown[0]}: unknown; there are {', '.join((*SMALL, *LARGE))}")
    interpreter(args.llama_cpp)
    return args


def main() -> None:
    args, cpu = arguments(), processor()
    lines = ["# Decoding of every format", ""]
    flags = ", ".join(cpu["flags"])  # type: ignore[arg-type]
    lines.append(f"{cpu['name']} ({flags}); {args.threads} threads; other load {cpu['load']:.2f} cores; {time.strftime('%Y-%m-%d')}.")
    lines.append(f"Held to {args.isa}." if args.isa else "Each engine used what it could.")
    lines.append(
        f"Medians of {args.rounds} rounds, the read ceiling is the highest of those measured between them; answers of {args.tokens} tokens."
    )
    lines.append(f"{', '.join(SMALL)} are of {args.small}, the others of {args.large}. Command: `{command_line()}`")
    lines += ["", f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    print("\n".join(lines), flush=True)
    for name in args.formats:
        with tempfile.TemporaryDirectory() as folder:
            line = row(name, measure(args, made(args.large if name in LARGE else args.small, name, Path(folder))))
        print(line, flush=True)
        lines.append(line)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
