"""The steps of a layer with their gradients, written out where a gradient is recorded and the kernels run.

torch's own operations pass over the activations a dozen times a norm and keep all that lies between; here each step is one function
whose backward pass is known: products by the fastest routine (linear.py), everything between them in one pass of the kernels
(kernels/train_rows.h, train_attention.h). Kept for the backward pass are the residual stream, q, k and v, gate and up, and what was
attended; the norm's output and SwiGLU's product are computed again.

Parameters are float32. Under `torch.autocast("cpu", dtype=torch.bfloat16)` products take and give bfloat16, the residual stream, the
norms' statistics and the sums over rows stay in float32. Left out: second derivatives, and the layers to which this does not apply
(another device, hooks, layers replaced by another kind): those go step by step in torch (fused.py).
"""

# N tokens of a ragged batch, D hidden, H heads, K kv heads, d head size, F feed-forward size, I input and O output width

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qwen2 import kernels
from qwen2.kernels import training
from qwen2.kernels.training import NormStruct, TrainAttentionStruct
from qwen2.model.linear import Linear, gradient_to_weight
from qwen2.quant.product import gradient_to_input, lend_threads, product

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = {torch.float32: training.FLOAT, torch.bfloat16: training.BF16}


def computed(x: Tensor, norm: nn.Module | None, *layers: nn.Module) -> bool:
    """Whether this step of a layer is computed here: x and all weights plain float32 on the CPU, and nobody listening in between."""
    if not torch.is_grad_enabled() or x.dtype != torch.float32 or compute_dtype() not in KINDS or not computes(x):
        return False
    if norm is not None and not (unheard(norm) and _plain(norm.weight)):  # type: ignore[arg-type]
        return False
    return all(type(layer) is Linear and unheard(layer) and _plain(layer.weight) for layer in layers)


def attended(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether attention of q (N, H, d), k and v (N, K, d) is computed here."""
    return torch.is_grad_enabled() and q.dtype == k.dtype == v.dtype and computes(q, k, v) and len(q) > 0 and q.shape[2] % 2 == 0


def computes(first: Tensor, *others: Tensor) -> bool:
    """Whether kernels can take these: plain tensors in the CPU's memory, the first of a type that they compute with."""
    return all(type(x) is Tensor and x.is_cpu for x in (first, *others)) and first.dtype in KINDS and kernels.isa() is not None


def unheard(module: nn.Module) -> bool:
    """Whether no hook waits for what goes through the module."""
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _plain(weight: Tensor) -> bool:  # no DTensor, nothing quantized
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.is_contiguous()


def compute_dtype() -> torch.dtype:
    """What products are computed in: float32, or what torch.autocast says."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def kind_of(dtype: torch.dtype) -> int:
    """The kernels' number of a type; also sees to it that they run on torch's threads, as many as torch has."""
    lend_threads()
    return KINDS[dtype]


def stacked(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices one below the other, in the type that is computed with."""
    if len(tensors) == 1:
        return tensors[0].to(dtype)
    out = torch.empty(sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:], dtype=dtype)
    for part, tensor in zip(out.split([len(tensor) for tensor in tensors]), tensors, strict=True):
        part.copy_(tensor)
    return out


def beside(parts: Sequence[Tensor]) -> Tensor:
    """Columns (N, O) each as one matrix: what they are views of, where they lie side by side there and fill it, else a copy."""
    first, at = parts[0], parts[0].storage_offset()
    width = sum(part.shape[1] for part in parts)
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.stride() == (width, 1)
        if not same or part.storage_offset() != at:
            return torch.cat(list(parts), dim=1)
        at += part.shape[1]
    return first.as_strided((len(first), width), (width, 1))


def normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """RMSNorm of x (N, D) in a type -> the output (N, D) and 1 / the root mean square (N,)."""
    y, inverse = torch.empty_like(x, dtype=dtype), torch.empty(len(x))
    at = [tensor.data_ptr() for tensor in (x, weight, y, inverse)]
    training.norm_forward(NormStruct(*at, None, None, None, len(x), x.shape[1], eps, kind_of(dtype)))
    return y, inverse


def norm_gradients(x: Tensor, weight: Tensor, inverse: Tensor, dy: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """From the output's gradient dy: those of x, plus `residual`, and of the weight. dy becomes the norm's output."""
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    at = [None if tensor is None else tensor.data_ptr() for tensor in (x, weight, dy, inverse, residual, dx, dweight)]
    training.norm_backward(NormStruct(*at, len(x), x.shape[1], 0.0, kind_of(dy.dtype)))
    return dx, dweight


def sum_of_rows(x: Tensor) -> Tensor:
    """(N, O) -> (O,) float32; rows may lie apart."""
    sums = torch.empty(x.shape[1])
    training.sum_rows(kind_of(x.dtype), x.data_ptr(), len(x), x.shape[1], x.stride(0), sums.data_ptr())
    return sums


def plus(x: Tensor, y: Tensor) -> Tensor:
    """x (N, D) float32 + y in any type."""
    out = torch.empty_like(x)
    training.add(kind_of(y.dtype), x.data_ptr(), y.data_ptr(), x.numel(), out.data_ptr())
    return out


class Norm(Function):
    """RMSNorm in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, inverse = normed(rows, weight, eps, torch.float32)
        ctx.save_for_backward(rows, weight, inverse)
        return y if y.shape == x.shape else y.view(x.shape)  # no view where none is needed: FSDP warns of one that a network ends in

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        dx, dweight = norm_gradients(x, weight, inverse, dy.reshape(x.shape).clone(memory_format=torch.contiguous_format), None)
        return dx.view(dy.shape), dweight, None


class NormedProducts(Function):
    """norm(x) through several layers; their outputs lie side by side in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, count: int, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = parameters[:count], [bias for bias in parameters[count:] if bias is not None]
        x, dtype = x.contiguous(), compute_dtype()
        y, inverse = normed(x, norm, eps, dtype)
        weight = stacked(weights, dtype)  # type: ignore[arg-type]
        out = product(y, weight, stacked(biases, dtype) if biases else None)
        ctx.save_for_backward(x, norm, inverse, *weights)
        ctx.count, ctx.dtype, ctx.biased, ctx.widths = count, dtype, bool(biases), [len(w) for w in weights]  # type: ignore[arg-type]
        return out.split(ctx.widths, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, inverse, *weights = ctx.saved_tensors
        dout = beside(gradients)
        dy = gradient_to_input(dout, stacked(weights, ctx.dtype))
        dx, dnorm = norm_gradients(x, norm, inverse, dy, None)
        dweight = gradient_to_weight(dout, dy).float()  # dy is the norm's output again
        dbias = sum_of_rows(dout).split(ctx.widths) if ctx.biased else [None] * ctx.count
        return dx, dnorm, None, None, *dweight.split(ctx.widths), *dbias


class AddedProduct(Function):
    """x + values W'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        dtype = compute_dtype()
        values = values.to(dtype)
        ctx.save_for_backward(values, weight)
        return plus(x.contiguous(), product(values, weight.to(dtype), None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, weight = ctx.saved_tensors
        dout = dx.to(values.dtype)
        return dx, gradient_to_input(dout, weight.to(values.dtype)), gradient_to_weight(dout, values).float()


class AddedFeedForward(Function):
    """x + down(silu(gate(y)) * up(y)) with y = norm(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        x, dtype = x.contiguous(), compute_dtype()
        y, inverse = normed(x, norm, eps, dtype)
        gate_up = product(y, stacked((gate, up), dtype), None)  # (N, 2F)
        gated = y.new_empty(len(x), len(gate))
        training.gated_forward(kind_of(dtype), gate_up.data_ptr(), len(x), len(gate), None, gated.data_ptr())
        ctx.save_for_backward(x, norm, inverse, gate_up, gate, up, down)
        return plus(x, product(gated, down.to(dtype), None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, inverse, gate_up, gate, up, down = ctx.saved_tensors
        dtype, dx = gate_up.dtype, dx.contiguous()
        dout = dx.to(dtype)
        gated = gradient_to_input(dout, down.to(dtype))  # its gradient (N, F), until the next line but one
        into = torch.empty_like(gate_up)
        training.gated_backward(kind_of(dtype), gate_up.data_ptr(), len(x), len(gate), None, gated.data_ptr(), into.data_ptr(), None)
        ddown = gradient_to_weight(dout, gated).float()
        dy = gradient_to_input(into, stacked((gate, up), dtype))
        dx, dnorm = norm_gradients(x, norm, inverse, dy, dx)
        dgate, dup = gradient_to_weight(into, dy).float().split([len(gate), len(up)])
        return dx, dnorm, None, dgate, dup, ddown


class RotatedAttention(Function):
    """Causal attention inside sequences of `lengths` (S,) int32, q and k rotated by the tables (N, 1, d/2) float32 first."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = (_heads_together(x) for x in (q, k, v))
        out, log_sums = q.new_empty(len(q), q.shape[1] * q.shape[2]), torch.empty(q.shape[1], len(q))
        step = _attention_step(q, k, v, cos, sin, lengths, out, log_sums)
        room = torch.empty(training.attention_bytes(step, False), dtype=torch.uint8)
        step.workspace = room.data_ptr()
        training.attention_forward(step)
        ctx.save_for_backward(q, k, v, cos, sin, lengths, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *others = ctx.saved_tensors
        step, dout = _attention_step(q, k, v, *others), dout.contiguous()
        widths = [x.shape[1] * x.shape[2] for x in (q, k, v)]
        into = q.new_empty(len(q), sum(widths))
        dq, dk, dv = (part.unflatten(1, (-1, q.shape[2])) for part in into.split(widths, dim=1))
        room = torch.empty(training.attention_bytes(step, True), dtype=torch.uint8)
        step.dout, step.dq, step.dk, step.dv, step.workspace = (x.data_ptr() for x in (dout, dq, dk, dv, room))
        step.dq_stride = step.dk_stride = step.dv_stride = into.shape[1]
        training.attention_backward(step)
        return dq, dk, dv, None, None, None


def _heads_together(x: Tensor) -> Tensor:
    """x (N, H, d) with each token's numbers without gaps; tokens may lie apart."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _attention_step(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> TrainAttentionStruct:
    """The call; the others: cos, sin, lengths, out, log_sums."""
    lengths = others[2]
    at = [tensor.data_ptr() for tensor in (q, k, v, *others)]
    strides = [tensor.stride(0) for tensor in (q, k, v)]
    d = q.shape[2]
    shape = (len(lengths), q.shape[1], k.shape[1], d, kind_of(q.dtype))
    return TrainAttentionStruct(*at, None, None, None, None, None, len(q), *strides, 0, 0, 0, d**-0.5, *shape)
