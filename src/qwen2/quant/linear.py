"""A linear layer whose weights stay packed: the kernels' product forward, and gradients to its input through the frozen weights.

Where no gradient is recorded the kernels multiply, with the input in int8 where the weights are in blocks. Where one is recorded the
input stays in floating point, forward and backward: y = x W' and dX = dY W with W unpacked a band of rows at a time. The weights
themselves get no gradient. Left out: products fused with what stands around them (model/fused.py).
"""

# n tokens, I input width, O output width

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from qwen2.kernels.calls import BoundProduct
from qwen2.quant.product import gradient_to_input, lend_threads, product

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qwen2.kernels.matrix import Matrix

BAND = 1 << 23  # weights unpacked at a time while gradients are recorded: 32 MiB in fp32


class PackedLinear(nn.Module):
    """x (..., I) -> (..., O) fp32 with the weights of a packed matrix (O, I) and a bias (O,) or none."""

    bias: nn.Parameter | None

    def __init__(self, matrix: Matrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.out_features, self.in_features = matrix.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.float().contiguous(), requires_grad=False))
        if self.bias is not None:
            matrix.set_bias(self.bias.detach().numpy())
        self.product = BoundProduct([matrix.struct])
        self.fused: Any = None  # a bound call that begins with this layer (model/fused.py)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            y: Tensor = FrozenProduct.apply(x, self.matrix)
            return y if self.bias is None else y + self.bias
        return run(self.product, x)

    def unpack(self) -> Iterator[tuple[str, Tensor]]:
        """The whole matrix (O, I), by its parameter's name; the bias is a parameter."""
        yield "weight", torch.cat(list(bands(self.matrix)))

    def packed_matrices(self) -> tuple[Matrix, ...]:
        return (self.matrix,)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, ggml type {self.matrix.type}, bias={self.bias is not None}"


def run(product: BoundProduct, x: Tensor, additions: int | None = None) -> Tensor:
    """The kernels' product of x (..., I), with what the rows' adapters add: (..., O)."""
    rows = x.float().reshape(-1, product.columns).contiguous()
    out = torch.empty(len(rows), product.width)
    product(rows.data_ptr(), len(rows), out.data_ptr(), additions)
    return out.view(*x.shape[:-1], product.width)


def multiply(x: Tensor, matrix: Matrix) -> Tensor:
    """x (..., I) by a packed matrix (O, I), differentiable in x."""
    if torch.is_grad_enabled():
        y: Tensor = FrozenProduct.apply(x, matrix)
        return y
    return run(BoundProduct([matrix.struct]), x)


class FrozenProduct(torch.autograd.Function):
    """x W' with a gradient for x alone, in floating point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        lend_threads()
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        if matrix.shape[0] * matrix.shape[1] <= BAND:
            return product(x, whole(matrix).to(x.dtype), None)
        out, start = x.new_empty(*x.shape[:-1], matrix.shape[0]), 0
        for band in bands(matrix):
            out[..., start : start + len(band)] = product(x, band.to(x.dtype), None)
            start += len(band)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        lend_threads()
        total, start = None, 0
        for band in bands(ctx.matrix):
            part = gradient_to_input(dy[..., start : start + len(band)], band.to(dy.dtype))  # (..., I)
            total = part if total is None else total.add_(part)
            start += len(band)
        assert total is not None, "a matrix has rows"
        return total, None


def whole(matrix: Matrix) -> Tensor:
    """The matrix (O, I) in fp32."""
    return unpack_rows(matrix, torch.arange(matrix.shape[0]))


def bands(matrix: Matrix) -> Iterator[Tensor]:
    """The matrix in fp32, some rows at a time: (rows, I) each."""
    rows, columns = matrix.shape
    step = max(1, BAND // max(1, columns))
    return (unpack_rows(matrix, torch.arange(start, min(start + step, rows))) for start in range(0, rows, step))


def unpack_rows(matrix: Matrix, rows: Tensor) -> Tensor:
    """Some rows (n,) of a packed matrix in fp32: (n, I), bit-equal to `dequantize`. Raises IndexError for a row it does not have."""
    count, columns = matrix.shape
    check_rows(rows, count)
    out = torch.empty(len(rows), columns)
    matrix.unpack(np.ascontiguousarray(rows.numpy(), dtype=np.int64), out.data_ptr())
    return out


def check_rows(rows: Tensor, count: int) -> None:
    """IndexError where one of the row numbers (n,) int64 is none of a matrix of `count` rows."""
    if len(rows):
        numbers = rows.tolist()
        least, most = min(numbers), max(numbers)
        if least < 0 or most >= count:
            raise IndexError(f"rows {least} to {most} of a matrix that has {count}")
