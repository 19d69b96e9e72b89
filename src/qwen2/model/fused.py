"""A layer in few native calls where its weights are packed; the same step by step in torch where they are not.

normed_products: several products of the normed input; added_product: a product added to the residual stream; added_feed_forward:
norm, gate, up, SiLU and down added to it; added_mixture: the same of a mixture of experts; run_layers: all layers, where
attention is the kernels' own too. Where a gradient is recorded a step of plain parameters is one function with a backward pass
(training.py), and so is one of frozen weights, packed or not (training_frozen.py). Anything else, as a layer that was replaced by
another kind, goes on in torch step by step.
Calls are bound once and kept by the layer's first product. The native ones change the residual stream in place. Where rows of a step
have adapters (adapted.py) the native calls add these too, and in torch each product does.
"""

# N tokens of a ragged batch, D hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from qwen2.kernels.calls import BoundFeedForward, BoundLayer, BoundLayers, BoundMixture, BoundProduct
from qwen2.model import training, training_frozen
from qwen2.model.packed import PackedExperts, TiedEmbedding
from qwen2.model.training_frozen import frozen
from qwen2.quant.linear import PackedLinear

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qwen2.model.adapted import AdaptedRows
    from qwen2.model.qwen2 import MLP, Decoder, MoE


def packed(*layers: nn.Module) -> bool:
    """Whether these may be computed in one native call."""
    return all(type(layer) in (PackedLinear, TiedEmbedding) for layer in layers) and not torch.is_grad_enabled()


def normed_products(x: Tensor, norm: nn.Module, layers: Sequence[nn.Module], adapted: AdaptedRows | None = None) -> tuple[Tensor, ...]:
    """norm(x) (N, D) through each of the layers: (N, O) each, side by side in memory where it was one call."""
    if frozen(x, norm, *layers):
        return training_frozen.normed_products(x, norm, layers)
    if training.computed(x, norm, *layers):
        parameters: list[Any] = [layer.weight for layer in layers] + [layer.bias for layer in layers]
        outs: tuple[Tensor, ...] = training.NormedProducts.apply(x, norm.weight, norm.eps, len(layers), *parameters)
        return outs
    if not packed(*layers):
        normed = norm(x)
        return tuple(product_of(layer, normed, adapted) for layer in layers)
    bound = bound_products(norm, layers)
    out = torch.empty(len(x), bound.width)
    bound(x.data_ptr(), len(x), out.data_ptr(), None if adapted is None else adapted.place(layers[0]))
    widths: list[Any] = [layer.out_features for layer in layers]
    return (out,) if len(layers) == 1 else out.split(widths, dim=1)  # a step's logits: a view would cost a hundredth of it


def product_of(layer: nn.Module, x: Tensor, adapted: AdaptedRows | None) -> Tensor:
    """x (N, I) through a layer, with what the rows' adapters add."""
    out: Tensor = layer(x) if adapted is None else adapted(layer, x)
    return out


def added_product(x: Tensor, values: Tensor, layer: nn.Module, adapted: AdaptedRows | None = None) -> Tensor:
    """x (N, D) + layer(values)."""
    if frozen(x, None, layer):
        return training_frozen.added_product(x, values, layer)
    if training.computed(x, None, layer):
        out: Tensor = training.AddedProduct.apply(x, values, layer.weight)
        return out
    if not packed(layer):
        return x + product_of(layer, values, adapted)
    bound_sum(layer)(values.data_ptr(), len(x), x.data_ptr(), None if adapted is None else adapted.place(layer))
    return x


def added_feed_forward(x: Tensor, norm: nn.Module, mlp: MLP, adapted: AdaptedRows | None = None) -> Tensor:
    """x (N, D) + mlp(norm(x))."""
    if frozen(x, norm, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        return training_frozen.added_feed_forward(x, norm, mlp)
    if training.computed(x, norm, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        out: Tensor = training.AddedFeedForward.apply(x, norm.weight, norm.eps, *weights)
        return out
    if not packed(mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        return x + mlp.plain(norm(x), adapted)
    bound_feed_forward(norm, mlp)(x.data_ptr(), len(x), None if adapted is None else adapted.place(mlp.gate_proj))
    return x


def added_mixture(x: Tensor, norm: nn.Module, moe: MoE, router_logits: list[Tensor] | None, adapted: AdaptedRows | None = None) -> Tensor:
    """x (N, D) + moe(norm(x)); `router_logits` receives (N, E) where it is given."""
    if not packed(*_dense_layers(moe)):
        return x + moe.plain(norm(x), router_logits, adapted)
    logits = _room(router_logits, len(x), moe)
    places = None if logits is None else logits.data_ptr(), None if adapted is None else adapted.place(moe.shared_expert.gate_proj)
    bound_mixture(norm, moe)(x.data_ptr(), len(x), *places)
    return x


def run_layers(decoder: Decoder, x: Tensor, attend: Any, router_logits: list[Tensor] | None, adapted: AdaptedRows | None = None) -> bool:
    """All layers in one native call, x (N, D) changed in place; False where they have to be run one by one.

    Of the rows that `attend.wanted` leaves out the last layer writes keys and values and no more.

    That is where attention is not the kernels' own (engine/kernel_attention.py) or router logits are asked for.
    """
    step = getattr(attend, "step", None)
    if step is None or router_logits is not None or torch.is_grad_enabled():
        return False
    if decoder.bound is None:
        layers = [_bind(layer) for layer in decoder.layers]
        every = [layer for layer in layers if layer is not None]
        decoder.bound = BoundLayers(every) if len(every) == len(layers) else False
    if decoder.bound is False:
        return False
    decoder.bound(x.data_ptr(), len(x), step(0), attend.layer_bytes, attend.wanted, None if adapted is None else adapted.place())
    return True


def _bind(layer: Any) -> BoundLayer | None:
    attention, mlp = layer.self_attn, layer.mlp
    mixed = isinstance(getattr(mlp, "experts", None), PackedExperts)
    parts = _dense_layers(mlp) if mixed else [getattr(mlp, name, mlp) for name in ("gate_proj", "up_proj", "down_proj")]
    products = (attention.q_proj, attention.k_proj, attention.v_proj)
    if not packed(*products, attention.o_proj, *parts):
        return None
    norm = layer.post_attention_layernorm
    part = bound_mixture(norm, mlp) if mixed else bound_feed_forward(norm, mlp)
    return BoundLayer(bound_products(layer.input_layernorm, products), bound_sum(attention.o_proj), part)


def _dense_layers(moe: Any) -> list[Any]:
    shared = moe.shared_expert
    return [moe.gate, moe.shared_expert_gate, shared.gate_proj, shared.up_proj, shared.down_proj]


def _room(router_logits: list[Tensor] | None, n: int, moe: Any) -> Tensor | None:
    """Where a mixture's logits go: (N, E) at the end of the list, or nowhere."""
    if router_logits is None or not hasattr(moe, "experts"):
        return None
    router_logits.append(torch.empty(n, moe.moe.experts))
    return router_logits[-1]


def bound_products(norm: Any, layers: Sequence[Any]) -> BoundProduct:
    first = layers[0]  # modules may have been replaced since the decoder was built: their types are not the annotated ones
    if first.fused is None:
        first.fused = BoundProduct([layer.matrix.struct for layer in layers], norm.weight.data_ptr(), norm.eps)
    bound: BoundProduct = first.fused
    return bound


def bound_sum(layer: Any) -> BoundProduct:
    if layer.fused is None:
        layer.fused = BoundProduct([layer.matrix.struct], add=True)
    bound: BoundProduct = layer.fused
    return bound


def bound_feed_forward(norm: Any, mlp: Any) -> BoundFeedForward:
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if gate.fused is None:
        gate.fused = BoundFeedForward(norm.weight.data_ptr(), norm.eps, gate.matrix.struct, up.matrix.struct, down.matrix.struct)
    bound: BoundFeedForward = gate.fused
    return bound


def bound_mixture(norm: Any, moe: Any) -> BoundMixture:
    if moe.gate.fused is None:
        router, shared_router, *shared = [layer.matrix.struct for layer in _dense_layers(moe)]
        experts = [[matrix.struct for matrix in expert] for expert in moe.experts.matrices]
        settings = (moe.moe.active, moe.moe.norm_topk)
        moe.gate.fused = BoundMixture(norm.weight.data_ptr(), norm.eps, router, shared_router, shared, experts, *settings)
    bound: BoundMixture = moe.gate.fused
    return bound
