"""Decoding a mixture of experts beside a dense model: bytes of active weights read per second.

The mixture is Qwen2-57B-A14B's layer (64 experts of 2,560, 8 active, a shared one of 20,480, hidden 3,584) with random Q4_0 blocks, as
often as memory allows; speed is a matter of shapes, not of values. Both models run in one process, alternating, medians. Left out:
its answers, which mean nothing, and llama.cpp (peers.py takes the file too, with --keep).

    python bench/moe.py [--layers 4] [--dense qwen2.5-coder:0.5b] [--keep FILE] [--isa avx2]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from random import Random
from statistics import median

import numpy as np
import torch

from qwen2 import LLM, kernels
from qwen2.config.family import FAMILY
from qwen2.config.gguf import gguf_shapes
from qwen2.engine.speed import Ceilings, measure_decode
from qwen2.weights.export import gguf_metadata
from qwen2.weights.gguf_write import TensorToWrite, write_gguf
from qwen2.weights.mixes import choose
from qwen2.weights.model import open_files
from qwen2.weights.store import Store

MIX, BLOCK_BYTES, BLOCK = "Q4_0", 18, 32
SCALE = np.float16(0.004)  # of weights of deviation 0.02, as a new model has them


def blocks(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random Q4_0 blocks of one scale."""
    found = np.frombuffer(np.random.default_rng(seed).bytes(prod(shape) // BLOCK * BLOCK_BYTES), dtype=np.uint8).copy()
    found.reshape(-1, BLOCK_BYTES)[:, :2] = np.frombuffer(SCALE.tobytes(), dtype=np.uint8)
    return found


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Norms of about one; a router that is undecided."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return 1 + 0.01 * drawn if len(shape) == 1 else 0.02 * drawn


def write(path: Path, layers: int, vocabulary: Path) -> None:
    """The random mixture as a GGUF file, with the tokenizer of the model in `vocabulary`."""
    config = replace(FAMILY["qwen2:57b-a14b"].config, layers=layers)
    tensors = []
    for seed, (name, shape) in enumerate(gguf_shapes(config).items()):
        choice = choose(name, shape, config, MIX)
        raw = partial(blocks, shape, seed) if choice.type == MIX else None
        tensors.append(TensorToWrite(name, shape, choice, partial(values, shape, seed), raw))
    with open_files(vocabulary) as opened:
        write_gguf(path, gguf_metadata(config, opened.tokenizer, opened.generation, "random mixture"), tensors, MIX)


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
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mixture.gguf" if args.keep is None else args.keep
        if not path.exists():
            write(path, args.layers, Store().resolve(args.dense)[0])
        common = {"threads": args.threads, "isa": args.isa, "context": 1024}
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
