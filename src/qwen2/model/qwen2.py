"""The decoder of the whole family, dense and mixture of experts, for training, prefill and decode.

One forward pass over a *ragged batch*: the tokens of all sequences laid end to end. What differs between uses (causal training,
a key-value cache, dual chunks) is the `attend` callable that the caller builds for the step; see attention.py. Parameters carry
the Hugging Face checkpoint's names; the experts alone are stacked (weights/checkpoint.py splits and stacks them).

What is left out: caches, sampling and loading. No device is named here; the parameters' device is the model's.

    network = Qwen2(config)
    hidden = network(tokens, packed_attend(config, positions, lengths))     # (N, D)
    network.logits(hidden)                                                  # (N, V)
"""

# N tokens of a ragged batch, D hidden, H heads, K kv heads, d head size, V vocabulary, E experts

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwen2.model import training
from qwen2.model.fused import added_feed_forward, added_mixture, added_product, normed_products, packed, product_of, run_layers
from qwen2.model.linear import Linear, as_int8, linear
from qwen2.model.lora import AdaptedLinear, Adapter
from qwen2.model.moe import Experts, gated, route
from qwen2.model.packed import PackedEmbedding, PackedExperts, TiedEmbedding
from qwen2.model.training_moe import mixed, mixture_computed
from qwen2.quant.linear import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qwen2.config import ModelConfig
    from qwen2.model.adapted import AdaptedRows
    from qwen2.model.attention import Attend

Factory = dict[str, Any]


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467); the statistics in float32, the weight applied after casting back."""

    def __init__(self, size: int, eps: float, factory: Factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, **factory))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if training.computed(x, self):
            y: Tensor = training.Norm.apply(x, self.weight, self.eps)
            return y
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; biases on q, k and v only."""

    def __init__(self, config: ModelConfig, layer: int, factory: Factory) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        kv_width = config.kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden, config.hidden, **factory)
        self.k_proj = Linear(config.hidden, kv_width, **factory)
        self.v_proj = Linear(config.hidden, kv_width, **factory)
        self.o_proj = Linear(config.hidden, config.hidden, bias=False, **factory)

    def forward(self, x: Tensor, norm: RMSNorm, attend: Attend, adapted: AdaptedRows | None = None) -> Tensor:
        products = normed_products(x, norm, (self.q_proj, self.k_proj, self.v_proj), adapted)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in products)
        return added_product(x, attend(self.layer, q, k, v), self.o_proj, adapted)  # (N, H*d) -> (N, D)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, hidden: int, ffn: int, factory: Factory) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, ffn, bias=False, **factory)
        self.up_proj = Linear(hidden, ffn, bias=False, **factory)
        self.down_proj = Linear(ffn, hidden, bias=False, **factory)

    def forward(self, x: Tensor, norm: RMSNorm, router_logits: list[Tensor] | None = None, adapted: AdaptedRows | None = None) -> Tensor:
        return added_feed_forward(x, norm, self, adapted)

    def plain(self, x: Tensor, adapted: AdaptedRows | None = None) -> Tensor:
        hidden = gated(product_of(self.gate_proj, x, adapted), product_of(self.up_proj, x, adapted))
        return product_of(self.down_proj, hidden, adapted)


class MoE(nn.Module):
    """Routed experts plus sigmoid(gate(x)) times the shared expert."""

    def __init__(self, config: ModelConfig, factory: Factory) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe = config.moe
        self.gate = Linear(config.hidden, config.moe.experts, bias=False, **factory)
        self.experts = Experts(config.hidden, config.moe, **factory)
        self.shared_expert = MLP(config.hidden, config.moe.shared_ffn, factory)
        self.shared_expert_gate = Linear(config.hidden, 1, bias=False, **factory)

    def forward(self, x: Tensor, norm: RMSNorm, router_logits: list[Tensor] | None = None, adapted: AdaptedRows | None = None) -> Tensor:
        return added_mixture(x, norm, self, router_logits, adapted)

    def plain(self, x: Tensor, router_logits: list[Tensor] | None = None, adapted: AdaptedRows | None = None) -> Tensor:
        logits = self.gate(x)  # (N, E)
        if router_logits is not None:
            router_logits.append(logits)
        weights, chosen = route(logits, self.moe)
        if mixture_computed(x, self):
            return mixed(x, self, weights, chosen)
        shared = product_of(self.shared_expert_gate, x, adapted).sigmoid() * self.shared_expert.plain(x, adapted)
        return self.experts(x, chosen, weights.to(x.dtype)) + shared


class Layer(nn.Module):
    """Pre-norm residual block: attention, then the feed-forward part."""

    def __init__(self, config: ModelConfig, layer: int, factory: Factory) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps, factory)
        self.self_attn = Attention(config, layer, factory)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps, factory)
        self.mlp = MoE(config, factory) if config.is_moe(layer) else MLP(config.hidden, config.ffn, factory)

    def forward(self, x: Tensor, attend: Attend, router_logits: list[Tensor] | None, adapted: AdaptedRows | None = None) -> Tensor:
        x = self.self_attn(x, self.input_layernorm, attend, adapted)
        return self.mlp(x, self.post_attention_layernorm, router_logits, adapted)


class Embedding(nn.Embedding):
    """torch's, left uninitialised: to draw its numbers without memory torch imports its compiler, which takes over a second.

    `int8_input` as in `Linear`, where it is the output head too.
    """

    int8_input = False

    def __init__(self, vocab: int, hidden: int, factory: Factory) -> None:
        super().__init__(vocab, hidden, _weight=torch.empty(vocab, hidden, **factory))


class Decoder(nn.Module):
    """Embedding, layers, final norm: what a checkpoint calls `model.*`."""

    def __init__(self, config: ModelConfig, factory: Factory) -> None:
        super().__init__()
        self.embed_tokens: nn.Embedding | PackedEmbedding | TiedEmbedding = Embedding(config.vocab, config.hidden, factory)
        self.layers = nn.ModuleList(Layer(config, layer, factory) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps, factory)
        self.bound: Any = None  # the native call that layers of packed weights are

    def forward(
        self, tokens: Tensor, attend: Attend, router_logits: list[Tensor] | None, normed: bool, adapted: AdaptedRows | None = None
    ) -> Tensor:
        embed = self.embed_tokens
        x = embed.rows(tokens) if isinstance(embed, TiedEmbedding) else embed(tokens)  # (N, D)
        if not run_layers(self, x, attend, router_logits, adapted):  # the loop below in one native call
            for layer in self.layers:
                x = layer(x, attend, router_logits, adapted)
        return self.norm(x) if normed else x


class Qwen2(nn.Module):
    """The decoder and its head. Build it on the "meta" device to load a checkpoint into it, elsewhere to train."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        factory: Factory = {"dtype": dtype, "device": device}
        self.config = config
        self.model = Decoder(config, factory)
        self.lm_head = None if config.tied else Linear(config.hidden, config.vocab, bias=False, **factory)

    def forward(
        self,
        tokens: Tensor,
        attend: Attend,
        router_logits: list[Tensor] | None = None,
        normed: bool = True,
        adapted: AdaptedRows | None = None,
    ) -> Tensor:
        """tokens (N,) of a ragged batch -> normed hidden states (N, D), or as the last layer left them.

        `router_logits`, when given, receives each mixture layer's (N, E), for the balance loss. `adapted`: which adapters rows have.
        """
        return self.model(tokens, attend, router_logits, normed, adapted)

    def next_logits(self, x: Tensor, adapted: AdaptedRows | None = None) -> Tensor:
        """Rows as the last layer left them (R, D) -> (R, V): the final norm and the head, one native call where that is packed.

        `adapted` matters where the head is a matrix of its own.
        """
        if not packed(self.head):
            return self.logits(self.model.norm(x), adapted)
        (logits,) = normed_products(x, self.model.norm, (self.head,), None if self.lm_head is None else adapted)
        return logits

    @property
    def head(self) -> nn.Module:
        """What makes logits of hidden states: a matrix of its own, or the embedding."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, hidden: Tensor, adapted: AdaptedRows | None = None) -> Tensor:
        """Rows of hidden states (..., D) -> (..., V). Apart from `forward`, so that prefill computes one row a sequence."""
        head = self.head
        if isinstance(head, Embedding):
            return linear(as_int8(hidden) if head.int8_input and not torch.is_grad_enabled() else hidden, head.weight)
        return product_of(head, hidden, None if self.lm_head is None else adapted)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.norm.weight.dtype

    @property
    def packed(self) -> bool:
        """Whether the matrices are in the kernels' layout."""
        return self.lanes > 0

    @property
    def lanes(self) -> int:
        """Rows that lie interleaved in the packed matrices: they name the set of kernels that computes with them. 0 for plain ones."""
        return next((int(module.matrix.struct.lanes) for module in self.modules() if isinstance(module, PackedLinear)), 0)

    def weight_bytes(self) -> int:
        """Memory of all weights but those of an embedding that stays in its file."""
        matrices = sum(matrix.nbytes for module in self.modules() for matrix in getattr(module, "packed_matrices", tuple)())
        return matrices + sum(parameter.nbytes for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name; what is kept packed is unpacked to float32, an adapter merged, when its turn comes."""
        for path, module in self.named_modules():
            if isinstance(module, Adapter):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if name != "weight" or not isinstance(module, AdaptedLinear):
                    yield f"{path}.{name}", parameter
            if isinstance(module, (PackedEmbedding, PackedLinear, PackedExperts, AdaptedLinear)):
                yield from ((f"{path}.{name}", tensor) for name, tensor in module.unpack())

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> Qwen2:
        """Normal(0, init_range) matrices, zero biases, unit norms; returns itself."""
        for name, parameter in self.named_parameters():
            self.init_weight(name, parameter, generator)
        return self

    def init_weight(self, name: str, weight: Tensor, generator: torch.Generator | None) -> None:
        """Fill one parameter, or a tensor of its shape, in place."""
        if "norm" in name:
            weight.fill_(1.0)
        elif name.endswith(".bias"):
            weight.zero_()
        else:
            weight.normal_(0.0, self.config.init_range, generator=generator)
