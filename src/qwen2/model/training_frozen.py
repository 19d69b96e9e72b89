"""The steps of a layer whose own weights stay as they are, with or without adapters: training.py's steps, less what is not asked for.

A frozen weight needs no gradient, so of the three products of a step two are left. Adapters add their two thin products to the wide
one's result in place, and nothing but their (N, r) middle is kept for the backward pass beyond what training.py keeps; the input that
A's gradient needs is computed again, as it is there. Weights that are packed (quant/linear.py) are unpacked a layer at a time, forward
and backward, and never rounded to int8: that is QLoRA.

Layers that share an input (q, k and v; gate and up) share its dropout. Left out: DoRA, which goes step by step in torch (lora.py).
"""

# N tokens of a ragged batch, D hidden, F feed-forward size, I input and O output width, r rank of an adapter, R of all of a group

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qwen2.kernels import training
from qwen2.model.linear import Linear, gradient_to_weight
from qwen2.model.lora import AdaptedLinear, AdaptedPacked, Adapter, dropped, new_seed
from qwen2.model.training import KINDS, beside, compute_dtype, computes, kind_of, norm_gradients, normed, plus, stacked, unheard
from qwen2.quant.linear import PackedLinear, bands
from qwen2.quant.product import gradient_to_input, product

if TYPE_CHECKING:
    from collections.abc import Sequence

    Layer = Linear | PackedLinear

ROWS = 1024  # of the feed-forward part at a time: as many as make products fast


def frozen(x: Tensor, norm: nn.Module | None, *layers: nn.Module) -> bool:
    """Whether this step of a layer is computed here: x float32 on the CPU, no weight of the base wants a gradient, nobody listens."""
    if not torch.is_grad_enabled() or x.dtype != torch.float32 or compute_dtype() not in KINDS or not computes(x) or not len(x):
        return False
    if norm is not None and not (unheard(norm) and _fits(norm.weight)):  # type: ignore[arg-type]
        return False
    return all(_frozen_layer(layer) for layer in layers)


def _frozen_layer(layer: nn.Module) -> bool:
    adapter = adapter_of(layer)
    if adapter is not None and (adapter.lora_magnitude_vector is not None or not unheard(adapter)):
        return False
    if not unheard(layer) or (getattr(layer, "bias", None) is not None and not _fits(layer.bias)):  # type: ignore[arg-type]
        return False
    if type(layer) in (PackedLinear, AdaptedPacked):
        return True
    return type(layer) in (Linear, AdaptedLinear) and _fits(layer.weight)  # type: ignore[arg-type]


def _fits(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and not weight.requires_grad and weight.dtype in KINDS and weight.is_contiguous()


def adapter_of(layer: nn.Module) -> Adapter | None:
    """A layer's adapter, where it has one that takes part."""
    return layer.adapter if isinstance(layer, (AdaptedLinear, AdaptedPacked)) and layer.switch.on else None


# ------------------------------------------------------------------------------------------------------------------ the base


def weight_of(layers: Sequence[Layer], dtype: torch.dtype) -> Tensor:
    """The base's weights one below the other (O, I) in the type that is computed with; packed ones are unpacked."""
    if all(isinstance(layer, Linear) for layer in layers):
        return stacked([layer.weight for layer in layers], dtype)  # type: ignore[misc]
    out, start = torch.empty(sum(layer.out_features for layer in layers), layers[0].in_features, dtype=dtype), 0
    for layer in layers:
        for band in [layer.weight] if isinstance(layer, Linear) else bands(layer.matrix):
            out[start : start + len(band)] = band
            start += len(band)
    return out


def bias_of(layers: Sequence[Layer], dtype: torch.dtype) -> Tensor | None:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return stacked(biases, dtype) if biases else None


# -------------------------------------------------------------------------------------------------------------- the adapters


class Group:
    """The adapters of layers that share an input: what is added forward, and the gradients. `parameters`: each layer's A and B, or None."""

    def __init__(self, layers: Sequence[Layer], parameters: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        adapters, start = [adapter_of(layer) for layer in layers], 0
        self.parts: list[tuple[slice, slice, Tensor, float]] = []  # columns of the output, columns of the middle, B (O, r), scale
        matrices, rank = [], 0
        for number, (layer, adapter) in enumerate(zip(layers, adapters, strict=True)):
            a, b, width = parameters[2 * number], parameters[2 * number + 1], layer.out_features
            if adapter is not None:
                assert a is not None, "an adapter has both"
                assert b is not None, "an adapter has both"
                self.parts.append((slice(start, start + width), slice(rank, rank + len(a)), b.to(dtype), adapter.scale))
                matrices.append(a)
                rank += len(a)
            start += width
        self.a = stacked(matrices, dtype) if matrices else None  # (R, I)
        dropouts = [adapter.dropout for adapter in adapters if adapter is not None and adapter.training]
        self.dropout = max(dropouts, default=0.0)

    def seed(self) -> int:
        """Of what a step drops; 0 where nothing is."""
        return new_seed() if self.dropout else 0

    def add(self, out: Tensor, y: Tensor, seed: int) -> Tensor | None:
        """Add to out (N, O) what the adapters make of y (N, I) -> their middle (N, R)."""
        if self.a is None:
            return None
        middle = product(self.dropped(y, seed), self.a, None)
        for columns, ranks, b, scale in self.parts:
            out[:, columns].addmm_(middle[:, ranks], b.t(), alpha=scale)
        return middle

    def dropped(self, y: Tensor, seed: int) -> Tensor:
        return dropped(y, self.dropout, seed) if self.dropout else y

    def gradients_of_b(self, dout: Tensor, middle: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From the output's gradient (N, O): that of the middle (N, R), and those of each B (O, r) float32."""
        dmiddle, db = torch.empty_like(middle), []
        for columns, ranks, b, scale in self.parts:
            torch.mm(dout[:, columns], b * scale, out=dmiddle[:, ranks])
            db.append((dout[:, columns].t() @ middle[:, ranks]).float().mul_(scale))
        return dmiddle, db

    def add_to_input(self, dy: Tensor, dmiddle: Tensor, seed: int) -> None:
        """Add to the input's gradient dy (N, I) what comes through the adapters."""
        assert self.a is not None
        if self.dropout:
            dy += dropped(dmiddle @ self.a, self.dropout, seed)
        else:
            dy.addmm_(dmiddle, self.a)

    def gradients_of_a(self, dmiddle: Tensor, y: Tensor, seed: int) -> list[Tensor]:
        """Those of each A (r, I) float32, from the group's input y."""
        da = gradient_to_weight(dmiddle, self.dropped(y, seed)).float()
        return [da[ranks] for _, ranks, _, _ in self.parts]

    def in_order(self, layers: Sequence[Layer], da: list[Tensor], db: list[Tensor]) -> list[Tensor | None]:
        """Gradients as a function takes the parameters: A and B of each layer, None where it has no adapter."""
        found: list[Tensor | None] = []
        for layer in layers:
            found += [da.pop(0), db.pop(0)] if adapter_of(layer) is not None else [None, None]
        return found


def parameters_of(layers: Sequence[nn.Module]) -> list[Tensor | None]:
    """A and B of each layer, None where it has no adapter."""
    adapters = [adapter_of(layer) for layer in layers]
    return [part for adapter in adapters for part in ((None, None) if adapter is None else (adapter.lora_A, adapter.lora_B))]


# ------------------------------------------------------------------------------------------------------------------- the steps


def normed_products(x: Tensor, norm: Any, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """norm(x) (N, D) through each of the layers: (N, O) each, side by side in memory."""
    outs: tuple[Tensor, ...] = NormedProducts.apply(x, norm.weight, norm.eps, layers, *parameters_of(layers))
    return outs


def added_product(x: Tensor, values: Tensor, layer: Any) -> Tensor:
    """x (N, D) + layer(values)."""
    out: Tensor = AddedProduct.apply(x, values, [layer], *parameters_of([layer]))
    return out


def added_feed_forward(x: Tensor, norm: Any, mlp: Any) -> Tensor:
    """x (N, D) + mlp(norm(x))."""
    layers = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    out: Tensor = AddedFeedForward.apply(x, norm.weight, norm.eps, layers, *parameters_of(layers))
    return out


class NormedProducts(Function):
    """norm(x) through several layers; their outputs lie side by side in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, layers: list[Layer], *parameters: Tensor | None) -> tuple[Tensor, ...]:
        x, dtype = x.contiguous(), compute_dtype()
        y, inverse = normed(x, norm, eps, dtype)
        out = product(y, weight_of(layers, dtype), bias_of(layers, dtype))
        ctx.group = Group(layers, parameters, dtype)
        ctx.seed = ctx.group.seed()
        middle = ctx.group.add(out, y, ctx.seed)
        ctx.save_for_backward(x, norm, inverse, middle)
        ctx.layers, ctx.dtype, ctx.eps = layers, dtype, eps
        return out.split([layer.out_features for layer in layers], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, norm, inverse, middle = ctx.saved_tensors
        group, dout = ctx.group, beside(gradients)
        da: list[Tensor] = []
        db: list[Tensor] = []
        if middle is not None:
            dmiddle, db = group.gradients_of_b(dout, middle)
        dx = None
        if ctx.needs_input_grad[0]:
            y = gradient_to_input(dout, weight_of(ctx.layers, ctx.dtype))  # its gradient, until the next line but two
            if middle is not None:
                group.add_to_input(y, dmiddle, ctx.seed)
            dx, _ = norm_gradients(x, norm, inverse, y, None)
        else:  # the first layer's: nothing below it learns
            y, _ = normed(x, norm, ctx.eps, ctx.dtype)
        if middle is not None:
            da = group.gradients_of_a(dmiddle, y, ctx.seed)
        return dx, None, None, None, *group.in_order(ctx.layers, da, db)


class AddedProduct(Function):
    """x + layer(values)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layers: list[Layer], *parameters: Tensor | None) -> Tensor:
        dtype = compute_dtype()
        values = values.to(dtype)
        out = product(values, weight_of(layers, dtype), bias_of(layers, dtype))
        ctx.group = Group(layers, parameters, dtype)
        ctx.seed = ctx.group.seed()
        middle = ctx.group.add(out, values, ctx.seed)
        ctx.save_for_backward(values if middle is not None else None, middle)
        ctx.layers, ctx.dtype = layers, dtype
        return plus(x.contiguous(), out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
        values, middle = ctx.saved_tensors
        group, dout = ctx.group, dx.to(ctx.dtype)
        dvalues = gradient_to_input(dout, weight_of(ctx.layers, ctx.dtype)) if ctx.needs_input_grad[1] else None
        if middle is None:
            return dx, dvalues, None, None, None
        dmiddle, db = group.gradients_of_b(dout, middle)
        if dvalues is not None:
            group.add_to_input(dvalues, dmiddle, ctx.seed)
        da = group.gradients_of_a(dmiddle, values, ctx.seed)
        return dx, dvalues, None, *group.in_order(ctx.layers, da, db)


class AddedFeedForward(Function):
    """x + down(silu(gate(y)) * up(y)) with y = norm(x). What is as wide as the feed-forward part exists for some rows at a time, but
    for gate and up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, layers: list[Layer], *parameters: Tensor | None) -> Tensor:
        x, dtype, wide, down = x.contiguous(), compute_dtype(), layers[:2], layers[2:]
        y, inverse = normed(x, norm, eps, dtype)
        gate_up = product(y, weight_of(wide, dtype), None)  # (N, 2F)
        ctx.wide, ctx.down = Group(wide, parameters[:4], dtype), Group(down, parameters[4:], dtype)
        ctx.wide_seed, ctx.down_seed = ctx.wide.seed(), ctx.down.seed()
        wide_middle = ctx.wide.add(gate_up, y, ctx.wide_seed)
        weight, middles, out = weight_of(down, dtype), [], y  # y has been read
        for number, rows in enumerate(pieces(len(x))):
            values = swiglu(gate_up[rows])
            out[rows] = product(values, weight, None)
            middles.append(ctx.down.add(out[rows], values, ctx.down_seed + number))
        down_middle = torch.cat(middles) if ctx.down.a is not None else None
        ctx.save_for_backward(x, norm, inverse, gate_up, wide_middle, down_middle)
        ctx.layers, ctx.dtype = layers, dtype
        return plus(x, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
        x, norm, inverse, gate_up, wide_middle, down_middle = ctx.saved_tensors
        dtype, dx, wide, down = ctx.dtype, dx.contiguous(), ctx.wide, ctx.down
        down_weight, wide_weight = weight_of(ctx.layers[2:], dtype), weight_of(ctx.layers[:2], dtype)
        dout, y, dmiddles = dx.to(dtype), x.new_empty(x.shape, dtype=dtype), []  # y: its gradient first, then the norm's output again
        da, db, wide_db = Sums(), Sums(), Sums()
        for number, rows in enumerate(pieces(len(x))):
            values = gradient_to_input(dout[rows], down_weight)  # SwiGLU's gradient (n, F), then SwiGLU again
            if down_middle is not None:
                dmiddle, more = down.gradients_of_b(dout[rows], down_middle[rows])
                db.add(more)
                down.add_to_input(values, dmiddle, ctx.down_seed + number)
            into = swiglu_gradient(gate_up[rows], values)
            if down_middle is not None:
                da.add(down.gradients_of_a(dmiddle, values, ctx.down_seed + number))
            y[rows] = gradient_to_input(into, wide_weight)
            if wide_middle is not None:
                dmiddle, more = wide.gradients_of_b(into, wide_middle[rows])
                wide_db.add(more)
                dmiddles.append(dmiddle)
        wide_da: list[Tensor] = []
        if wide_middle is not None:
            wide_dmiddle = torch.cat(dmiddles)
            wide.add_to_input(y, wide_dmiddle, ctx.wide_seed)
        dx, _ = norm_gradients(x, norm, inverse, y, dx)
        if wide_middle is not None:
            wide_da = wide.gradients_of_a(wide_dmiddle, y, ctx.wide_seed)
        return dx, None, None, None, *wide.in_order(ctx.layers, wide_da + da.total, wide_db.total + db.total)


class Sums:
    """Tensors added up, each in its place."""

    def __init__(self) -> None:
        self.total: list[Tensor] = []

    def add(self, more: list[Tensor]) -> None:
        self.total = [one.add_(other) for one, other in zip(self.total, more, strict=True)] if self.total else more


def pieces(rows: int) -> list[slice]:
    """The rows of a step, some at a time."""
    return [slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate and up side by side (n, 2F) -> (n, F)."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    training.gated_forward(kind_of(out.dtype), gate_up.data_ptr(), *_sizes(out), None, out.data_ptr())
    return out


def swiglu_gradient(gate_up: Tensor, gradient: Tensor) -> Tensor:
    """That of gate_up (n, 2F); `gradient` (n, F), of SwiGLU, becomes its value again."""
    into = torch.empty_like(gate_up)
    at = [tensor.data_ptr() for tensor in (gate_up, gradient, into)]
    training.gated_backward(kind_of(into.dtype), at[0], *_sizes(gradient), None, at[1], at[2], None)
    return into


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]
