"""Put the matrices of a checkpoint into the kernels' layout, so that they are computed with as they are stored.

A source gives each matrix as rows of one ggml type, and where they lie in a file as they are, the kernels read them there; otherwise
they are read a few MB at a time. Either way loading takes the memory of the result only.
Vectors (norms, biases) become float32 parameters. What is left out: the layout itself (kernels/), and which file holds what.
"""

# E experts, F expert feed-forward size, D hidden

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qwen2.kernels.matrix import PIECE as ARENA_PIECE
from qwen2.kernels.matrix import Arena, Matrix, lanes, pack_file
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
TURN = 1 << 26  # bytes packed in one native call, so that whoever else computes meanwhile gets a turn too
POSITIONED = hasattr(os, "pread")  # where several threads may read one file


@dataclass(frozen=True)
class Place:
    """Where a matrix lies as it is wanted: a descriptor that stays open, the first byte, and the file's name for complaints."""

    file: int
    offset: int
    path: Path


@dataclass(frozen=True)
class Rows:
    """A matrix of one ggml type in a file: `read(first, count)` gives that many rows' bytes, flat; `place` where all lie in order."""

    ggml_type: int
    rows: int
    columns: int
    read: Callable[[int, int], np.ndarray]
    place: Place | None = None


class Packing:
    """Matrices that have their memory and wait for their weights; `run` brings them, and needs neither torch nor much of Python."""

    def __init__(self) -> None:
        self.arena = Arena(ARENA_PIECE)
        self._waiting: list[tuple[Rows, Matrix]] = []
        self._stopped = False

    def stop(self) -> None:
        """From another thread: `run` ends soon, with what it has, since nobody wants the weights any more."""
        self._stopped = True

    def add(self, rows: Rows) -> Matrix:
        """Memory for a matrix. ValueError for a type or a width without a kernel."""
        matrix = Matrix.empty(rows.ggml_type, rows.rows, rows.columns, self.arena)
        self._waiting.append((rows, matrix))
        return matrix

    def run(self) -> None:
        """Read and pack everything. ValueError where a file ends too early."""
        placed = [(rows.place, matrix) for rows, matrix in self._waiting if rows.place is not None]
        for _, group in groupby(placed, key=lambda pair: pair[0].file):
            self._run_placed(list(group))
        for rows, matrix in self._waiting:
            if rows.place is None and not self._stopped:
                _pack(rows, matrix)
        self._waiting.clear()

    def _run_placed(self, placed: list[tuple[Place, Matrix]]) -> None:
        while placed and not self._stopped:
            sizes = accumulate(matrix.nbytes for _, matrix in placed)
            count = max(1, sum(size <= TURN for size in sizes))
            now, placed = placed[:count], placed[count:]
            try:
                pack_file(now[0][0].file, [matrix for _, matrix in now], [place.offset for place, _ in now])
            except ValueError as error:
                raise ValueError(f"{now[0][0].path}: {error}; download it again") from None


def _pack(rows: Rows, matrix: Matrix) -> None:
    step = max(1, PIECE * rows.rows // max(1, matrix.nbytes) // lanes()) * lanes()
    for first in range(0, rows.rows, step):
        matrix.pack(rows.read(first, min(step, rows.rows - first)), first)


def fill_packed(config: ModelConfig, source: Source, dtype: torch.dtype | None) -> tuple[Qwen2, Packing]:
    """A network for the CPU whose matrices are packed, without their weights yet: those come with `Packing.run`, from any thread.

    `dtype` stores matrices in that type instead of the file's.
    """
    network = Qwen2(config, dtype=torch.float32, device="meta")
    biased = not source.may_lack_biases or any(source.has(name) for name, _ in network.named_parameters() if name.endswith(".bias"))
    cpu, packing = torch.device("cpu"), Packing()

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
            setattr(parent, leaf, PackedLinear(packing.add(rows), bias))
        elif isinstance(module, nn.Embedding):
            tied = embedding is None
            setattr(
                parent,
                leaf,
                TiedEmbedding(packing.add(source.rows(f"{path}.weight", module.weight.shape, dtype)[0])) if tied else embedding,
            )
        elif path.endswith(".experts"):
            stacks = [
                [packing.add(rows) for rows in source.rows(f"{path}.{name}", p.shape, dtype)] for name, p in module.named_parameters()
            ]
            gate_up, down = stacks
            setattr(parent, leaf, PackedExperts(list(zip(gate_up[0::2], gate_up[1::2], down, strict=True))))
        elif isinstance(module, RMSNorm):
            setattr(parent, leaf, PackedNorm(vector(f"{path}.weight", module.weight.shape), module.eps))
    source.check_rest()
    return network.eval(), packing
