"""Put the matrices of a checkpoint into the kernels' layout, so that they are computed with as they are stored.

A source gives each matrix as rows of one ggml type, read a few MB at a time, so that loading takes the memory of the result only.
Vectors (norms, biases) become float32 parameters. What is left out: the layout itself (kernels/), and which file holds what.
"""

# E experts, F expert feed-forward size, D hidden

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from qwen2.kernels.matrix import PIECE as ARENA_PIECE
from qwen2.kernels.matrix import Arena, Matrix, lanes
from qwen2.model import Qwen2
from qwen2.model.packed import PackedExperts, PackedNorm, TiedEmbedding
from qwen2.model.qwen2 import RMSNorm
from qwen2.quant.linear import PackedLinear

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qwen2.config import ModelConfig
    from qwen2.weights.fill import Source

PIECE = 1 << 22  # bytes read and packed at a time


@dataclass(frozen=True)
class Rows:
    """A matrix of one ggml type in a file: `read(first, count)` gives that many rows' bytes, flat."""

    ggml_type: int
    rows: int
    columns: int
    read: Callable[[int, int], np.ndarray]


def pack(rows: Rows, arena: Arena) -> Matrix:
    """Read and pack a matrix."""
    matrix = Matrix.empty(rows.ggml_type, rows.rows, rows.columns, arena)
    step = max(1, PIECE * rows.rows // max(1, matrix.nbytes) // lanes()) * lanes()
    for first in range(0, rows.rows, step):
        matrix.pack(rows.read(first, min(step, rows.rows - first)), first)
    return matrix


def fill_packed(config: ModelConfig, source: Source, dtype: torch.dtype | None) -> Qwen2:
    """A network for the CPU whose matrices are packed; `dtype` stores them in that type instead of the file's."""
    network = Qwen2(config, dtype=torch.float32, device="meta")
    biased = not source.may_lack_biases or any(source.has(name) for name, _ in network.named_parameters() if name.endswith(".bias"))
    cpu, arena = torch.device("cpu"), Arena(ARENA_PIECE)

    def vector(name: str, shape: torch.Size) -> Tensor:
        if name.endswith(".bias") and not biased:
            return torch.zeros(shape)
        return source.load(name, shape, torch.float32, cpu)

    embedding = source.packed("model.embed_tokens.weight", torch.float32) if dtype is None and not config.tied else None
    for path, module in list(network.named_modules()):
        parent = network.get_submodule(path.rpartition(".")[0])
        leaf = path.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            (rows,) = source.rows(f"{path}.weight", module.weight.shape, dtype)
            bias = None if module.bias is None else vector(f"{path}.bias", module.bias.shape)
            setattr(parent, leaf, PackedLinear(pack(rows, arena), bias))
        elif isinstance(module, nn.Embedding):
            tied = embedding is None
            setattr(
                parent,
                leaf,
                TiedEmbedding(pack(source.rows(f"{path}.weight", module.weight.shape, dtype)[0], arena)) if tied else embedding,
            )
        elif path.endswith(".experts"):
            stacks = [
                [pack(rows, arena) for rows in source.rows(f"{path}.{name}", p.shape, dtype)] for name, p in module.named_parameters()
            ]
            gate_up, down = stacks
            setattr(parent, leaf, PackedExperts(list(zip(gate_up[0::2], gate_up[1::2], down, strict=True))))
        elif isinstance(module, RMSNorm):
            setattr(parent, leaf, PackedNorm(vector(f"{path}.weight", module.weight.shape), module.eps))
    source.check_rest()
    return network.eval()
