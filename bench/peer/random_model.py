"""GGUF files of any shape in the family with random weights: speed is a matter of shapes, not of values. Their answers mean nothing.

A matrix repeats its first rows, packed once, so a file of 7B takes seconds.

    python bench/peer/random_model.py qwen2:7b OUT.gguf [--mix Q4_K_M] [--layers 28] [--vocabulary qwen2.5-coder:0.5b]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch

from qwen2.config.family import FAMILY
from qwen2.config.gguf import gguf_shapes
from qwen2.config.model import ModelConfig
from qwen2.quant import FORMATS, quantize
from qwen2.weights.export import gguf_metadata
from qwen2.weights.gguf_write import TensorToWrite, write_gguf
from qwen2.weights.mixes import choose, mix_named
from qwen2.weights.model import open_files
from qwen2.weights.store import Store

ROWS = 61  # of a matrix that are drawn: a prime, so that the threads' tiles and the heads do not all hold the same


def values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Norms of about one; matrices of deviation 0.02, as a new model has them."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return 1 + 0.01 * drawn if len(shape) == 1 else 0.02 * drawn


def packed(shape: tuple[int, ...], ggml_type: int, seed: int) -> np.ndarray:
    """The bytes of a matrix whose rows repeat."""
    first = quantize(values((min(ROWS, prod(shape[:-1])), shape[-1]), seed), ggml_type)
    return np.resize(first, FORMATS[ggml_type].size(prod(shape)))


def write(path: Path, config: ModelConfig, mix: str, vocabulary: Path) -> None:
    """A model of this shape in the mix `mix`, with the tokenizer of the model that lies at `vocabulary`."""
    tensors = []
    for seed, (name, shape) in enumerate(gguf_shapes(config).items()):
        choice = choose(name, shape, config, mix)
        raw = None if choice.type == "F32" else partial(packed, shape, choice.number, seed)  # norms, biases, routers: every row its own
        tensors.append(TensorToWrite(name, shape, choice, partial(values, shape, seed), raw))
    with open_files(vocabulary) as opened:
        write_gguf(path, gguf_metadata(config, opened.tokenizer, opened.generation, "random weights"), tensors, mix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(FAMILY))
    parser.add_argument("out", type=Path)
    parser.add_argument("--mix", default="Q4_K_M")
    parser.add_argument("--layers", type=int, help="left out: all")
    parser.add_argument("--vocabulary", default="qwen2.5-coder:0.5b", help="a name or a GGUF file")
    args = parser.parse_args()
    config = FAMILY[args.shape].config
    try:
        config = config if args.layers is None else replace(config, layers=args.layers)
        write(args.out, config, mix_named(args.mix), Store().resolve(args.vocabulary)[0])
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
