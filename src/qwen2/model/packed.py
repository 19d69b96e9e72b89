"""Weights that stay in their file's blocks: the embedding, of which a step needs a few rows only.

A vocabulary of 152,000 rows is a fifth of the smallest model; unpacked to float32 it would cost 544 MB that nothing reads. The rows
of a step are unpacked when they are looked up, with the same values. What is left out: products with packed weights (kernels).
"""

# N tokens of a ragged batch, D hidden, V vocabulary

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from qwen2.quant import dequantize, dequantize_rows

if TYPE_CHECKING:
    from torch import Tensor


class PackedEmbedding(nn.Module):
    """An embedding (V, D) of one GGUF format, looked up in `dtype`. `blocks` is flat uint8, and may be a mapped file."""

    def __init__(self, blocks: Tensor, ggml_type: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks, self.ggml_type, self.shape, self.dtype = blocks, ggml_type, shape, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return dequantize_rows(self.blocks, self.ggml_type, self.shape[1], tokens, self.dtype)

    def unpack(self) -> Tensor:
        """The whole matrix (V, D)."""
        return dequantize(self.blocks, self.ggml_type, self.shape, self.dtype)
