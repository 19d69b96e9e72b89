"""The matrix product of every layer, with the split that keeps all cores reading when there are few rows.

torch hands a product with one float32 row to a matrix-vector routine that runs on one thread, and two to four rows to a blocked
product that is slower still. Cut into a few bands of output rows and given to the batched product, every core reads its own
bands: measured on a Zen 5 with two threads, (4864, 896) read at 43 instead of 16 GB/s for one row and at 35 instead of 10 for
four; from eight rows on the blocked product is as good. bfloat16 has a parallel routine of its own and gains nothing.

What is left out: quantized weights (the kernels' own linear).
"""

# N rows, I input width, O output width, S bands

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 4
BANDS = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) by weight (O, I) -> (..., O), the same product as torch's `linear`."""
    rows = x.numel() // x.shape[-1]
    if rows == 0 or rows > FEW_ROWS or x.dtype != torch.float32 or not x.is_cpu or len(weight) % BANDS or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1).t().expand(BANDS, -1, -1)  # (S, I, N)
    out = torch.bmm(weight.view(BANDS, -1, weight.shape[1]), columns)  # (S, O / S, N)
    out = out.view(*x.shape[:-1], -1) if rows == 1 else out.flatten(0, 1).t().reshape(*x.shape[:-1], -1)
    return out if bias is None else out + bias


class Linear(nn.Linear):
    """A linear layer whose product is `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
