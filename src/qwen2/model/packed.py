"""Embeddings and experts whose weights stay packed, and the norm that goes with them.

A vocabulary of 152,000 rows is a fifth of the smallest model; unpacked to float32 it would cost 544 MB that nothing reads. Where the
embedding is the output head too, it lies in the kernels' layout, otherwise it stays in its file, mapped; either way the rows of a
step are unpacked when they are looked up, with the same values. Left out: the products themselves (quant/linear.py, fused.py).
"""

# N tokens of a ragged batch, D hidden, V vocabulary, E experts, F expert feed-forward size

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from qwen2 import kernels
from qwen2.kernels.calls import check, native, norm_rows
from qwen2.kernels.matrix import lanes
from qwen2.model.moe import by_expert, gated
from qwen2.quant import dequantize, dequantize_rows
from qwen2.quant.linear import PackedLinear, bands, check_rows, multiply, unpack_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from qwen2.kernels.matrix import Matrix


class PackedEmbedding(nn.Module):
    """An embedding (V, D) of one GGUF format, looked up in `dtype`. `blocks` is flat uint8, and may be a mapped file."""

    def __init__(self, blocks: Tensor, ggml_type: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks, self.ggml_type, self.shape, self.dtype = blocks, ggml_type, shape, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        if self.dtype == torch.float32 and kernels.isa() is not None:
            return self._native_rows(tokens)
        return dequantize_rows(self.blocks, self.ggml_type, self.shape[1], tokens, self.dtype)

    def _native_rows(self, tokens: Tensor) -> Tensor:
        count, columns = self.shape
        check_rows(tokens, count)
        out = torch.empty(len(tokens), columns)
        rows = tokens.contiguous()
        check(native().qwen2_unpack_blocks(self.ggml_type, columns, self.blocks.data_ptr(), rows.data_ptr(), len(rows), out.data_ptr()))
        return out

    def unpack(self) -> Iterator[tuple[str, Tensor]]:
        """The whole matrix (V, D), by its parameter's name."""
        yield "weight", dequantize(self.blocks, self.ggml_type, self.shape, self.dtype)


class TiedEmbedding(PackedLinear):
    """An embedding (V, D) that is the output head too: looked up by `rows`, multiplied as a linear layer."""

    def rows(self, tokens: Tensor) -> Tensor:
        return unpack_rows(self.matrix, tokens)


class PackedExperts(nn.Module):
    """The routed experts: for each its gate, up and down matrices."""

    def __init__(self, experts: Sequence[tuple[Matrix, Matrix, Matrix]]) -> None:
        super().__init__()
        self.matrices = list(experts)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (N, D), chosen experts and their weights (N, A) -> the weighted sum of the experts' outputs (N, D)."""
        return by_expert(x, chosen, weights, len(self.matrices), self.one)

    def one(self, expert: int, x: Tensor) -> Tensor:
        """One expert's SwiGLU on its rows (n, D) -> (n, D)."""
        gate, up, down = self.matrices[expert]
        return multiply(gated(multiply(x, gate), multiply(x, up)), down)

    def packed_matrices(self) -> tuple[Matrix, ...]:
        return tuple(matrix for expert in self.matrices for matrix in expert)

    def unpack(self) -> Iterator[tuple[str, Tensor]]:
        """The stacked parameters, by name."""
        whole = [[torch.cat(list(bands(matrix))) for matrix in expert] for expert in self.matrices]
        yield "gate_up_proj", torch.stack([torch.cat([gate, up]) for gate, up, _ in whole])
        yield "down_proj", torch.stack([down for _, _, down in whole])


class PackedNorm(nn.Module):
    """RMSNorm of a packed network: the kernels' bits, so that a layer computed step by step equals a fused one.

    Made while the set is chosen that the network is packed for.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
        self.eps, self.lanes = eps, lanes()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            normed: Tensor = nn.functional.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
            return normed
        x = x.float().contiguous()
        out = torch.empty_like(x)
        norm_rows(x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], self.weight.data_ptr(), self.eps, out.data_ptr(), self.lanes)
        return out
