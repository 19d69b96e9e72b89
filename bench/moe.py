"""Decoding a mixture of experts beside a dense model: bytes of active weights read per second.

The mixture is Qwen2-57B-A14B's layer (64 experts of 2,560, 8 active, a shared one of 20,480, hidden 3,584) with random Q4_0 weights, as
often as memory allows. Both models run in one process, alternating, medians. Left out: llama.cpp (peers.py takes the file too, with
--keep).

    python bench/moe.py [--layers 4] [--dense qwen2.5-coder:0.5b] [--keep FILE] [--isa avx2]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median

from peer.random_model import write

from qwen2 import LLM, kernels
from qwen2.config.family import FAMILY
from qwen2.engine.speed import Ceilings, measure_decode
from qwen2.weights.gguf_header import read_header
from qwen2.weights.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dense", default="qwen2.5-coder:0.5b", help="a name or a GGUF file")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where the mixture is written, or lies already")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=("avx2", "avx512", "neon"))
    args = parser.parse_args()
    if min(args.layers, args.rounds, args.tokens, args.threads) < 1:
        parser.error("--layers, --rounds, --tokens and --threads: at least 1")
    try:
        compare(args)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None


def compare(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mixture.gguf" if args.keep is None else args.keep
        if path.exists():
            found = read_header(path).metadata.get("qwen2moe.block_count")
            if found != args.layers:
                raise ValueError(f"{path} has {found} layers, --layers is {args.layers}: remove it, or name another file")
        else:
            write(path, replace(FAMILY["qwen2:57b-a14b"].config, layers=args.layers), "Q4_0", Store().resolve(args.dense)[0])
        common = {"threads": args.threads, "isa": args.isa, "context": 1024, "guesses": 0}
        models = {"mixture": LLM(path, **common), "dense": LLM(args.dense, **common)}
        rates: dict[str, list[float]] = {name: [] for name in models}
        ceilings, random = Ceilings(), Random(0)
        for llm in models.values():
            measure_decode(llm, 0, 1, 4, random)
        for _ in range(args.rounds):
            ceilings.measure()
            for name, llm in models.items():
                run = measure_decode(llm, 0, 1, args.tokens, random)
                rates[name].append(run.nbytes / run.seconds)
    print(f"kernels for {kernels.isa()}, {args.threads} threads, medians of {args.rounds}; read ceiling {ceilings.read / 1e9:.1f} GB/s")
    for name, found in rates.items():
        print(f"{name}: {median(found) / 1e9:.1f} GB/s of active weights and cache, {median(found) / ceilings.read:.0%} of the ceiling")
    print(f"mixture / dense: {median(rates['mixture']) / median(rates['dense']):.2f}")


if __name__ == "__main__":
    main()
