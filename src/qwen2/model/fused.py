"""The steps that a layer consists of besides attention, each one native call where the weights are packed.

normed_products: several products of the normed input; added_product: a product added to the residual stream; added_feed_forward:
norm, gate, up, SiLU and down added to it; added_mixture: the same of a mixture of experts. Where the weights are plain parameters, where a gradient is recorded, or where a layer
has been replaced by another kind, the same is done step by step in torch. The native calls change the residual stream in place.
"""

# N tokens of a ragged batch, D hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qwen2.kernels.calls import BoundFeedForward, BoundMixture, BoundProduct
from qwen2.model.packed import PackedExperts
from qwen2.quant.linear import PackedLinear

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qwen2.model.qwen2 import MLP, MoE, RMSNorm


def packed(*layers: nn.Module) -> bool:
    """Whether these may be computed in one native call."""
    return all(type(layer) is PackedLinear for layer in layers) and not torch.is_grad_enabled()


def normed_products(x: Tensor, norm: RMSNorm, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """norm(x) (N, D) through each of the layers: (N, O) each, side by side in memory where it was one call."""
    first = layers[0]
    if not packed(*layers):
        normed = norm(x)
        return tuple(layer(normed) for layer in layers)
    assert isinstance(first, PackedLinear)
    if first.fused is None:
        first.fused = BoundProduct([layer.matrix.struct for layer in layers], norm.weight.data_ptr(), norm.eps)  # type: ignore[union-attr]
    out = torch.empty(len(x), first.fused.width)
    first.fused(x.data_ptr(), len(x), out.data_ptr())
    return out.split([layer.out_features for layer in layers], dim=1)  # type: ignore[misc]


def added_product(x: Tensor, values: Tensor, layer: nn.Module) -> Tensor:
    """x (N, D) + layer(values)."""
    if not packed(layer):
        return x + layer(values)
    assert isinstance(layer, PackedLinear)
    if layer.fused is None:
        layer.fused = BoundProduct([layer.matrix.struct], add=True)
    layer.fused(values.data_ptr(), len(x), x.data_ptr())
    return x


def added_feed_forward(x: Tensor, norm: RMSNorm, mlp: MLP) -> Tensor:
    """x (N, D) + mlp(norm(x))."""
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if not packed(gate, up, down):
        return x + mlp.plain(norm(x))
    if gate.fused is None:
        gate.fused = BoundFeedForward(norm.weight.data_ptr(), norm.eps, gate.matrix.struct, up.matrix.struct, down.matrix.struct)
    gate.fused(x.data_ptr(), len(x))
    return x


def added_mixture(x: Tensor, norm: RMSNorm, moe: MoE, router_logits: list[Tensor] | None) -> Tensor:
    """x (N, D) + moe(norm(x)); `router_logits` receives (N, E) where it is given."""
    shared, experts = moe.shared_expert, moe.experts
    layers = [moe.gate, moe.shared_expert_gate, shared.gate_proj, shared.up_proj, shared.down_proj]
    if not packed(*layers) or not isinstance(experts, PackedExperts):
        return x + moe.plain(norm(x), router_logits)
    if moe.gate.fused is None:
        router, shared_router, *triple = [layer.matrix.struct for layer in layers]
        each = [[matrix.struct for matrix in expert] for expert in experts.matrices]
        settings = (moe.moe.active, moe.moe.norm_topk)
        moe.gate.fused = BoundMixture(norm.weight.data_ptr(), norm.eps, router, shared_router, triple, each, *settings)
    logits = None if router_logits is None else torch.empty(len(x), moe.moe.experts)
    moe.gate.fused(x.data_ptr(), len(x), None if logits is None else logits.data_ptr())
    if router_logits is not None and logits is not None:
        router_logits.append(logits)
    return x
