"""The matrix product of every layer, by the fastest routine that torch carries for its shape.

torch gives float32 products on a CPU to MKL. One row goes to a matrix-vector routine of one thread, two to sixteen rows to a
blocked product that reads weights at a third of the memory's speed, and on AMD processors large products leave AVX-512 unused.
oneDNN, which torch carries too, does none of this; and for up to four rows of narrow matrices the batched product over bands of
output rows is faster still. Measured with two threads on a Zen 5, weights (4864, 896): 512 rows 447 GFLOP/s instead of 194;
16 rows 22 GB/s instead of 11; one row 39 GB/s instead of 17. With both libraries held to AVX2 the order is the same.

oneDNN's product knows no gradient; `Product` adds it: dX = dY W by the same routine, dW = dY' X by torch's, which takes a transposed
factor without a copy. (Zen 4, 4,096 rows, width 384 to 1,024: forward and to the input 214 GFLOP/s instead of 185, to the weights 190.)

Where there are no kernels for this processor, weights that a file holds in blocks are widened, and `as_int8` rounds their input as the
kernels do, so that each product is the same to 1e-4; a whole model's logits drift apart further, as two roundings of one number do
wherever it lies between two integers.
"""

# N rows, I input width, O output width, S bands

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qwen2.quant.product import HAS_ONEDNN, gradient_to_input, product

FEW_ROWS = 4
NARROW = 2048  # input width up to which bands are the faster of the two for few rows
BANDS = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) by weight (O, I) -> (..., O), the same product as torch's `linear` up to the order of additions."""
    rows = x.numel() // x.shape[-1]
    if x.dtype != torch.float32 or not x.is_cpu or rows == 0 or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    if rows <= FEW_ROWS and x.shape[-1] <= NARROW and len(weight) % BANDS == 0:
        out = in_bands(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias
    if not HAS_ONEDNN or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    y: Tensor = Product.apply(x, weight, bias)
    return y


def gradient_to_weight(dy: Tensor, x: Tensor) -> Tensor:
    """dy (N, O), x (N, I) -> (O, I)."""
    return dy.t() @ x


class Product(torch.autograd.Function):
    """`product` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = gradient_to_input(rows, weight).view(x.shape) if to_x else None
        dweight = gradient_to_weight(rows, x.reshape(-1, x.shape[-1])) if to_weight else None
        return dx, dweight, rows.sum(0) if to_bias else None


def in_bands(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, I) by weight (O, I) -> (N, O), each core on bands of output rows of its own."""
    columns = x.t().expand(BANDS, -1, -1)  # (S, I, N)
    out = torch.bmm(weight.view(BANDS, -1, weight.shape[1]), columns)  # (S, O / S, N)
    return out.flatten(0, 1).t().contiguous()


def as_int8(x: Tensor) -> Tensor:
    """x (..., I) rounded to int8 in groups of 32 with a scale each, and back: what the kernels multiply weights in blocks with."""
    groups = x.unflatten(-1, (-1, 32))
    highest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(highest < 1e-35, 0.0, 127 / highest)  # a group of next to nothing counts as zeros
    return ((groups * inverse).round() * (highest * (1 / 127))).flatten(-2)


class Linear(nn.Linear):
    """A linear layer whose product is `linear`; `int8_input` rounds the input where no gradient is recorded."""

    int8_input = False

    def forward(self, input: Tensor) -> Tensor:
        if self.int8_input and not torch.is_grad_enabled():
            input = as_int8(input)
        return linear(input, self.weight, self.bias)
