"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a network whose own weights stay as they are.

A layer's weight W (O, I) counts as W + scale * B A with A (r, I) and B (O, r), and only A and B learn. rsLoRA (arXiv 2312.03732) scales
by alpha / sqrt(r) instead of alpha / r. DoRA (arXiv 2402.09353) gives each row of the sum a length of its own that is learned too; the
length that it has is no part of the gradient (section 4.3). First values are PEFT's: A uniform within 1 / sqrt(I), B zero.

An adapted layer is the layer that it replaces, with its weights and names, plus an `adapter`; plain and packed layers alike (a packed
one is QLoRA). Layers share a `Switch`, by which the base alone can be asked. Where a gradient is recorded, a step of these
layers is one function (training_frozen.py); what stands here is the same in torch, for DoRA and for everything else.

Left out: embeddings and routed experts as targets, and PEFT's folders (weights/adapter.py).

    add_lora(network, LoraSettings(rank=16, targets="attention"))
    with without_lora(network): ...                                  # the base
    merge(network)                                                   # plain layers again, W + scale * B A
"""

# N tokens, I input width, O output width, r rank

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwen2.config.lora import GROUPS, LoraSettings
from qwen2.model.linear import Linear, linear
from qwen2.quant.linear import PackedLinear, bands

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from qwen2.model.qwen2 import Qwen2

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUTER = "mlp.gate"  # a mixture's: which expert answers is no product to be bent; PEFT does not take it for a linear layer either
TIED = "the embedding and the output head are one matrix in this model: adapted in one place, it would change in the other when merged"


@dataclass
class Switch:
    """Of a whole network: whether its adapters take part."""

    on: bool = True


class Adapter(nn.Module):
    """What one linear layer (O, I) has been given: A, B and, with DoRA, the lengths of the rows."""

    lora_magnitude_vector: nn.Parameter | None
    row_squares: Tensor | None

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0, magnitude: Tensor | None = None) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.register_parameter("lora_magnitude_vector", None if magnitude is None else nn.Parameter(magnitude))
        self.register_buffer("row_squares", None, persistent=False)  # of W, which does not change
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, y: Tensor, layer: AdaptedLinear | AdaptedPacked) -> Tensor:
        """x (..., I) and what the base makes of it, y (..., O) -> the adapted layer's output."""
        inner = self.middle(x)  # (..., r)
        added = linear(inner, self.lora_B.to(inner.dtype)).to(y.dtype)
        if self.lora_magnitude_vector is None:
            return torch.add(y, added, alpha=self.scale)
        share = self.lora_magnitude_vector / self.lengths(layer)  # (O,)
        plain = y if layer.bias is None else y - layer.bias.to(y.dtype)
        out = (plain + self.scale * added) * share.to(y.dtype)
        return out if layer.bias is None else out + layer.bias.to(y.dtype)

    def middle(self, x: Tensor) -> Tensor:
        """x (..., I), some of it dropped where that is wanted, by A -> (..., r)."""
        if self.training and self.dropout:
            x = Dropout.apply(x, self.dropout)
        return linear(x, self.lora_A.to(x.dtype))

    def effective(self, layer: AdaptedLinear | AdaptedPacked) -> Tensor:
        """The weight (O, I) that the layer counts as, with gradients for the adapter: for who needs it whole. Nothing is dropped."""
        total = torch.addmm(torch.cat(list(layer.weight_bands())), self.lora_B, self.lora_A, alpha=self.scale)
        if self.lora_magnitude_vector is None:
            return total
        return total * (self.lora_magnitude_vector / self.lengths(layer))[:, None]

    @torch.no_grad()
    def lengths(self, layer: AdaptedLinear | AdaptedPacked) -> Tensor:
        """The rows' lengths of W + scale * B A (O,), without making it: |w + s b|^2 = |w|^2 + 2 s wb + s^2 |b|^2 for each row."""
        if self.row_squares is None:
            self.row_squares = torch.cat([band.square().sum(1) for band in layer.weight_bands()])
        a, b = self.lora_A.detach(), self.lora_B.detach()
        mixed = (torch.cat([band @ a.t() for band in layer.weight_bands()]) * b).sum(1)
        own = ((b @ (a @ a.t())) * b).sum(1)
        return (self.row_squares + 2 * self.scale * mixed + self.scale**2 * own).clamp_(min=0).sqrt_()

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The weight (O, I) that a plain layer needs to give the same, in the type of `weight`."""
        total = torch.addmm(weight.float(), self.lora_B, self.lora_A, alpha=self.scale)
        if self.lora_magnitude_vector is not None:
            total *= (self.lora_magnitude_vector / torch.linalg.vector_norm(total, dim=1))[:, None]
        return total.to(weight.dtype)


class AdaptedLinear(Linear):
    """A plain layer and its adapter."""

    def __init__(self, base: Linear, adapter: Adapter, switch: Switch) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.int8_input = base.in_features, base.out_features, base.int8_input
        self.weight, self.bias = base.weight, base.bias
        self.adapter, self.switch = adapter, switch

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return self.adapter(input, y, self) if self.switch.on else y

    def weight_bands(self) -> Iterator[Tensor]:
        """The base's weight (O, I) in float32, some rows at a time."""
        yield self.weight.detach().float()

    def unpack(self) -> Iterator[tuple[str, Tensor]]:
        """The merged weight, by the parameter's name."""
        yield "weight", self.adapter.merged(self.weight.detach())

    def plain(self) -> Linear:
        """A layer without an adapter that gives the same."""
        with torch.device("meta"):
            layer = Linear(self.in_features, self.out_features, bias=False)
        layer.weight = nn.Parameter(self.adapter.merged(self.weight.detach()), requires_grad=False)
        layer.register_parameter("bias", self.bias)
        layer.int8_input = self.int8_input
        return layer.train(self.training)


class AdaptedPacked(PackedLinear):
    """A layer whose weights stay packed, and its adapter."""

    def __init__(self, base: PackedLinear, adapter: Adapter, switch: Switch) -> None:
        nn.Module.__init__(self)
        self.matrix, self.out_features, self.in_features = base.matrix, base.out_features, base.in_features
        self.bias, self.product, self.fused = base.bias, base.product, None
        self.adapter, self.switch = adapter, switch

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.adapter(x, y, self) if self.switch.on else y

    def weight_bands(self) -> Iterator[Tensor]:
        """As `AdaptedLinear`'s."""
        return bands(self.matrix)

    def unpack(self) -> Iterator[tuple[str, Tensor]]:
        """The merged weight, widened to float32: it has no exact form in blocks."""
        ((name, weight),) = super().unpack()
        yield name, self.adapter.merged(weight)

    def plain(self) -> Linear:
        """A layer without an adapter that gives the same, its weights in float32."""
        with torch.device("meta"):
            layer = Linear(self.in_features, self.out_features, bias=False)
        ((_, weight),) = self.unpack()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)


class Dropout(torch.autograd.Function):
    """Numbers set to 0 by chance, the others scaled so that their mean stays. Kept is the seed of the choice, not the choice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share, ctx.seed = share, new_seed()
        return dropped(x, share, ctx.seed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return dropped(gradients[0], ctx.share, ctx.seed), None


def new_seed() -> int:
    """From torch's generator, whose state a checkpoint keeps."""
    return int(torch.randint(2**62, ()))


def dropped(x: Tensor, share: float, seed: int) -> Tensor:
    """x with `share` (in steps of 1 / 65,536) of its numbers set to 0, the rest divided by what is left; the seed decides which.

    Sixteen random bits a number: torch draws 64 at a time, one after another, and a wide layer's input has millions of numbers.
    """
    least = round(share * 65536)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=torch.Generator(x.device).manual_seed(seed))
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= least - 32768
    return (x * kept).mul_(65536 / (65536 - least))


def add_lora(network: Qwen2, settings: LoraSettings, generator: torch.Generator | None = None) -> None:
    """Put a new adapter on each targeted layer, in place; everything else is frozen.

    ValueError where a target is none, naming those that there are; also for a network that has adapters already.
    """
    paths = targeted(network, settings.names)
    network.requires_grad_(False)
    give(network, {path: _new_adapter(network.get_submodule(path), settings, generator) for path in paths})


def give(network: Qwen2, adapters: dict[str, Adapter]) -> None:
    """Put these adapters on the layers of their names. ValueError for a network that has adapters already."""
    if next(adapted_layers(network), None) is not None:
        raise ValueError("this network has adapters already: merge them into its weights first")
    switch = Switch()
    for path, adapter in adapters.items():
        base, (parent, _, leaf) = network.get_submodule(path), path.rpartition(".")
        kind: Callable[..., nn.Module] = AdaptedPacked if isinstance(base, PackedLinear) else AdaptedLinear
        setattr(network.get_submodule(parent), leaf, kind(base, adapter, switch).train(base.training))
    network.model.bound = None  # the native call of all layers is found anew


def _new_adapter(layer: nn.Module, settings: LoraSettings, generator: torch.Generator | None) -> Adapter:
    assert isinstance(layer, (Linear, PackedLinear)), "targets are linear layers"
    device = layer.weight.device if isinstance(layer, Linear) else torch.device("cpu")
    bound = 1 / math.sqrt(layer.in_features)
    a = torch.empty(settings.rank, layer.in_features).uniform_(-bound, bound, generator=generator).to(device)
    b = torch.zeros(layer.out_features, settings.rank, device=device)
    magnitude = None
    if settings.dora:
        rows = [layer.weight.detach().float()] if isinstance(layer, Linear) else bands(layer.matrix)
        magnitude = torch.cat([torch.linalg.vector_norm(band, dim=1) for band in rows])
    return Adapter(a, b, settings.scale, settings.dropout, magnitude)


def targets_of(network: Qwen2) -> dict[str, list[str]]:
    """What may be adapted: the paths of the layers of each name. A head that is the embedding too is none."""
    found: dict[str, list[str]] = {}
    for path, module in network.named_modules():
        if type(module) in (Linear, PackedLinear, AdaptedLinear, AdaptedPacked) and not path.endswith(ROUTER):
            found.setdefault(path.rpartition(".")[2], []).append(path)
    return found


def targeted(network: Qwen2, names: Sequence[str]) -> list[str]:
    """The paths of the layers that are meant, in the network's order: groups, names, or whole paths.

    all-linear is every linear layer but the head, as in PEFT. ValueError naming the target that is none, and those that there are.
    """
    wanted: set[str] = set()
    for name in names:
        paths = matching(network, name)
        if not paths:
            raise ValueError(f"target {name!r}: there is no such layer; this model has {', '.join((*GROUPS, *targets_of(network)))}")
        wanted.update(paths)
    return [path for path, _ in network.named_modules() if path in wanted]


def matching(network: Qwen2, name: str) -> list[str]:
    """The paths of the layers that a target means; none where it is no layer's. ValueError for what cannot be adapted, saying why."""
    there = targets_of(network)
    paths = [path for leaf, every in there.items() for path in every if _meant(name, leaf, path)]
    last = name.rpartition(".")[2]
    if not paths and last in ("embed_tokens", "lm_head"):
        why = TIED if network.config.tied else "the embedding is looked up, not multiplied"
        raise ValueError(f"target {name!r}: {why}; this model has {', '.join((*GROUPS, *there))}")
    return paths


def _meant(name: str, leaf: str, path: str) -> bool:
    if name == "all-linear":
        return leaf != "lm_head"
    if name == "attention":
        return leaf in ATTENTION
    return path == name or path.endswith(f".{name}")


def adapted_layers(network: nn.Module) -> Iterator[tuple[str, AdaptedLinear | AdaptedPacked]]:
    """Every adapted layer with its path."""
    return ((path, module) for path, module in network.named_modules() if isinstance(module, (AdaptedLinear, AdaptedPacked)))


def lora_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name; empty for a network without adapters."""
    return {f"{path}.adapter.{name}": p for path, layer in adapted_layers(network) for name, p in layer.adapter.named_parameters()}


@contextmanager
def without_lora(network: nn.Module) -> Iterator[None]:
    """The network's base alone, meanwhile."""
    switches = [layer.switch for _, layer in adapted_layers(network)]
    before = [switch.on for switch in switches]
    for switch in switches:
        switch.on = False
    try:
        yield
    finally:
        for switch, on in zip(switches, before, strict=True):
            switch.on = on


def merge(network: Qwen2) -> None:
    """Plain layers in place of adapted ones, one at a time; packed weights become float32 ones. They get no gradients until asked."""
    for path, layer in list(adapted_layers(network)):
        parent, _, leaf = path.rpartition(".")
        setattr(network.get_submodule(parent), leaf, layer.plain())
    network.model.bound = None
