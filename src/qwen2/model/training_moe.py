"""The experts of a mixture with their gradients, written out as the steps in training.py are.

Rows are sorted by expert, and every expert's stretch is filled up to whole blocks, with a scale of 0 that makes what stands there
count nothing: products then come in few sizes, and oneDNN, which prepares code for each size it meets, has it ready. The router's
weights, and the shared expert's gate, scale the rows inside SwiGLU, so that their gradients fall out of the pass that is made anyway
and the results of a token's experts are simply added. Left out: the router's own softmax and choice (moe.py), in torch.
"""

# N tokens of a ragged batch, D hidden, E experts, A active experts a token, F expert feed-forward size, M rows sorted by expert

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qwen2.kernels import training
from qwen2.model.linear import gradient_to_input, gradient_to_weight, product
from qwen2.model.training import compute_dtype, computed, kind_of, stacked

if TYPE_CHECKING:
    from qwen2.model.qwen2 import MoE

BLOCK = 64  # rows


class Sorted(NamedTuple):
    """Where each token's rows lie when they are sorted by expert."""

    rows: Tensor  # (M,): the token of every place; 0 where it is filled up
    places: Tensor  # (N, A): the place of each token's rows
    counts: list[int]  # (E): rows of every expert, whole blocks


def sorted_by_expert(chosen: Tensor, experts: int) -> Sorted:
    """chosen (N, A) -> the order in which experts take rows."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)  # (N * A,)
    counts = torch.bincount(flat, minlength=experts)
    filled = (counts + BLOCK - 1).div(BLOCK, rounding_mode="floor") * BLOCK
    shift = (filled.cumsum(0) - filled) - (counts.cumsum(0) - counts)  # (E,)
    to = torch.arange(len(flat)) + shift[flat[order]]
    places = torch.empty_like(flat)
    places[order] = to
    sizes = filled.tolist()
    rows = torch.zeros(sum(sizes), dtype=torch.int64)
    rows[to] = order.div(chosen.shape[1], rounding_mode="floor")
    return Sorted(rows, places.view(chosen.shape), sizes)


def added_rows(x: Tensor, places: Tensor) -> Tensor:
    """The sum of each token's rows of x (M, D), places (N, A) -> (N, D) float32."""
    out, (n, active) = torch.empty(len(places), x.shape[1]), places.shape
    training.gather_rows(kind_of(x.dtype), x.data_ptr(), places.data_ptr(), n, active, x.shape[1], None, out.data_ptr())
    return out


def scaled_swiglu(gate_up: Tensor, scales: Tensor) -> Tensor:
    """scales (M,) * silu(gate) * up of gate_up (M, 2F) -> (M, F)."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    at = [tensor.data_ptr() for tensor in (gate_up, scales, out)]
    training.gated_forward(kind_of(out.dtype), at[0], len(out), out.shape[1], at[1], at[2])
    return out


def swiglu_gradients(gate_up: Tensor, scales: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Those of gate_up and scales; `gradient` (M, F), that of `scaled_swiglu`, becomes its value again."""
    into, dscales = torch.empty_like(gate_up), torch.empty_like(scales)
    at = [tensor.data_ptr() for tensor in (gate_up, scales, gradient, into, dscales)]
    training.gated_backward(kind_of(gate_up.dtype), at[0], len(gradient), gradient.shape[1], at[1], at[2], at[3], at[4])
    return into, dscales


def grouped(x: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """Each expert's rows of x (M, I) by its matrix of (E, I, O), which may be a transposed view -> (M, O)."""
    out = x.new_empty(len(x), matrices.shape[2])
    for rows, matrix, into in zip(x.split(counts), matrices, out.split(counts), strict=True):
        if len(rows):
            torch.mm(rows, matrix, out=into)
    return out


def grouped_to_weight(dy: Tensor, x: Tensor, counts: list[int]) -> Tensor:
    """dy (M, O), x (M, I) -> (E, O, I) float32."""
    out = torch.empty(len(counts), dy.shape[1], x.shape[1])
    for rows, others, into in zip(dy.split(counts), x.split(counts), out, strict=True):
        if not len(rows):
            into.zero_()
        elif dy.dtype == torch.float32:
            torch.mm(rows.t(), others, out=into)
        else:
            into.copy_(rows.t() @ others)
    return out


class RoutedExperts(Function):
    """x (N, D), the weights of chosen experts (N, A) and where their rows go -> the weighted sum of the experts' outputs (N, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Sorted) -> Tensor:
        dtype = compute_dtype()
        x, scales = x.to(dtype), torch.zeros(len(order.rows))
        scales[order.places.flatten()] = weights.flatten()
        middle = grouped(x[order.rows], gate_up.to(dtype).transpose(1, 2), order.counts)  # (M, 2F)
        ctx.save_for_backward(x, scales, middle, gate_up, down)
        ctx.order = order
        return added_rows(grouped(scaled_swiglu(middle, scales), down.to(dtype).transpose(1, 2), order.counts), order.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, scales, middle, gate_up, down = ctx.saved_tensors
        order, dtype = ctx.order, x.dtype
        dy = dout.to(dtype)[order.rows]  # (M, D)
        values = grouped(dy, down.to(dtype), order.counts)  # SwiGLU's gradient (M, F), then SwiGLU again
        into, dscales = swiglu_gradients(middle, scales, values)
        ddown = grouped_to_weight(dy, values, order.counts) if ctx.needs_input_grad[3] else None
        dgate_up = grouped_to_weight(into, x[order.rows], order.counts) if ctx.needs_input_grad[2] else None
        dx = added_rows(grouped(into, gate_up.to(dtype), order.counts), order.places)
        return dx, dscales[order.places], dgate_up, ddown, None


class SharedExpert(Function):
    """x (N, D), a scale of each row (N,) -> scale * down(silu(gate(x)) * up(x)) (N, D) float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        dtype = compute_dtype()
        x, scales = x.to(dtype), scales.float().contiguous()
        middle = product(x, stacked((gate, up), dtype), None)  # (N, 2F)
        ctx.save_for_backward(x, scales, middle, gate, up, down)
        return product(scaled_swiglu(middle, scales), down.to(dtype), None).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, scales, middle, gate, up, down = ctx.saved_tensors
        dy = dout.to(x.dtype)
        values = gradient_to_input(dy, down.to(x.dtype))
        into, dscales = swiglu_gradients(middle, scales, values)
        dx = gradient_to_input(into, stacked((gate, up), x.dtype)).float()
        if not any(ctx.needs_input_grad[2:]):  # frozen
            return dx, dscales, None, None, None
        ddown = gradient_to_weight(dy, values).float()
        dgate, dup = gradient_to_weight(into, x).float().split([len(gate), len(up)])
        return dx, dscales, dgate, dup, ddown


def mixture_computed(x: Tensor, moe: MoE) -> bool:
    """Whether this mixture's experts are computed here."""
    shared, experts = moe.shared_expert, moe.experts
    stacks = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
    plain = all(type(stack) is torch.nn.Parameter and stack.dtype == torch.float32 and stack.is_contiguous() for stack in stacks)
    return plain and len(x) > 0 and computed(x, None, shared.gate_proj, shared.up_proj, shared.down_proj)


def mixed(x: Tensor, moe: MoE, weights: Tensor, chosen: Tensor) -> Tensor:
    """The routed experts' and the shared expert's answers to x (N, D), as `route` chose."""
    shared = moe.shared_expert
    scales = moe.shared_expert_gate(x).float().sigmoid().squeeze(1)
    own: Tensor = SharedExpert.apply(x, scales, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    order = sorted_by_expert(chosen, moe.moe.experts)
    routed: Tensor = RoutedExperts.apply(x, weights.float(), moe.experts.gate_up_proj, moe.experts.down_proj, order)
    return own + routed
