"""Upcycling: a mixture of experts from a dense model, as Qwen2-57B-A14B was made from Qwen2-7B (Qwen2 report, section 2.2.2).

What the report states, for n experts of width h_E from a feed-forward part of width h_FFN:
1) the part is replicated ceil(n * h_E / h_FFN) times;
2) each copy is shuffled along its intermediate dimension: one permutation for the rows of gate and up and the columns of down;
3) the experts are cut from the copies laid end to end, and what remains is discarded;
4) half of each expert's parameters are drawn anew.

What it does not state is a setting here: whether weights or whole neurons are drawn anew and from which distribution, the shared
expert (here the dense part itself, replicated or cut to its width), the router (here small random numbers, so that experts are
chosen about evenly), and the outputs' scale. Routed experts are weighted with probabilities that add up to active / experts at
most, and their gate halves the shared expert at first, so with `scale` each neuron is multiplied up until all places that hold
it add up to what the dense part computes: exactly so with all experts active, a router of zeros and nothing drawn anew, and on
average with fewer active. SwiGLU is linear in up and down; both get the square root.

What is left out: other ratios by layer, and moving an optimizer's state (training starts a new one). Both models are in memory.

    upcycle(load("runs/base/model"), Upcycling(experts=16, active=4)).network
"""

# E experts, A active, F expert feed-forward size, S shared feed-forward size, H dense feed-forward size, D hidden

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Literal

import torch

from qwen2.config import MoEConfig
from qwen2.model import Qwen2

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.config import ModelConfig
    from qwen2.weights.model import Model

Part = tuple["Tensor", "Tensor", "Tensor"]  # gate (*, F, D), up (*, F, D), down (*, D, F)
GATE_AT_ZERO = 0.5  # sigmoid(0): what the shared expert's gate lets through before it has learned


@dataclass(frozen=True)
class Upcycling:
    """How a dense model becomes a mixture. Widths in elements; what is left open follows from the dense model."""

    experts: int = 16
    """Routed experts."""
    active: int = 4
    """Routed experts that a token goes through."""
    expert_ffn: int | None = None
    """Width of a routed expert; left out: as wide as the dense part, divided by the active experts."""
    shared_ffn: int | None = None
    """Width of the shared expert, at least 1, as Qwen2's layout always has one; left out: the dense part's."""
    reinit: float = 0.5
    """Share of each routed expert that is drawn anew."""
    unit: Literal["weight", "neuron"] = "weight"
    """What is drawn anew: single weights, or whole neurons (a row of gate and up with its column of down)."""
    reinit_std: float | None = None
    """Standard deviation of what is drawn anew; left out: that of the matrix it goes into."""
    shared_share: float = 0.5
    """Share of the dense part's output that the shared expert begins with; the routed ones have the rest."""
    scale: bool = True
    """Multiply neurons so that all experts together compute what the dense part did; without it weights are copied as they are."""
    router_std: float | None = None
    """Standard deviation of the router's weights; left out: the model's own for fresh matrices. 0 chooses no expert over another."""
    norm_topk: bool = False
    """Divide the chosen experts' probabilities by their sum (Qwen2 does not)."""
    aux_coef: float = 0.001
    """Weight of the balance loss in training, where that is not told another (--balance)."""
    seed: int = 0
    """Of the shuffles and of what is drawn anew."""

    def __post_init__(self) -> None:
        if self.active < 1:
            raise ValueError(f"active {self.active}: must be at least 1")
        if not 0 <= self.aux_coef < float("inf"):
            raise ValueError(f"aux_coef {self.aux_coef}: must be 0 or above, and finite")
        for name in ("reinit", "shared_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be between 0 and 1")
        if self.unit not in ("weight", "neuron"):
            raise ValueError(f"unit {self.unit!r}: must be weight or neuron")
        for name in ("reinit_std", "router_std"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} {value}: must be 0 or above")

    def config(self, dense: ModelConfig) -> ModelConfig:
        """The mixture's configuration. Raises ValueError where the dense model is one already or the widths do not fit it."""
        if dense.moe is not None:
            raise ValueError(f"the model is a mixture of {dense.moe.experts} experts already; upcycling starts from a dense one")
        expert_ffn = max(1, dense.ffn // self.active) if self.expert_ffn is None else self.expert_ffn
        shared_ffn = dense.ffn if self.shared_ffn is None else self.shared_ffn
        moe = MoEConfig(self.experts, self.active, expert_ffn, shared_ffn, norm_topk=self.norm_topk, aux_coef=self.aux_coef)
        if max(moe.experts * moe.expert_ffn, moe.shared_ffn) < dense.ffn:
            raise ValueError(
                f"{moe.experts} experts of {moe.expert_ffn} and a shared one of {moe.shared_ffn}: neither holds the dense part's "
                f"{dense.ffn} neurons, some would be lost; make the experts wider or more"
            )
        return replace(dense, moe=moe)


@torch.no_grad()
def upcycle(model: Model, how: Upcycling) -> Model:
    """The mixture made from a dense model; matrices that are not a feed-forward part are shared with it, not copied.

    Raises ValueError where the model is no dense one of the kind, or `how` does not fit it.
    """
    config = how.config(model.config)
    generator = torch.Generator().manual_seed(how.seed)
    old = dict(model.network.named_parameters())
    parts = tuple(f"{name}_proj.weight" for name in ("gate", "up", "down"))
    new = {name: parameter.detach() for name, parameter in old.items() if ".mlp." not in name}
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}.mlp."
        dense = tuple(old[prefix + part].detach().float() for part in parts)
        dtype = old[prefix + parts[0]].dtype
        for name, tensor in _mixture((dense[0], dense[1], dense[2]), config, how, generator).items():
            new[prefix + name] = tensor.to(dtype)
    network = Qwen2(config, device="meta")
    network.load_state_dict(new, assign=True)
    return replace(model, config=config, network=network.train(model.network.training))


def slots(ffn: int, count: int, generator: torch.Generator) -> Tensor:
    """Steps 1 to 3 of the report: for each of `count` places the dense neuron it holds (count,), from shuffled copies end to end."""
    copies = [torch.randperm(ffn, generator=generator) for _ in range(ceil(count / ffn))]
    return torch.cat(copies)[:count]


def neuron_scales(routed: Tensor, shared: Tensor, ffn: int, moe: MoEConfig, shared_share: float) -> tuple[Tensor, Tensor]:
    """What each place's output is multiplied by, routed (E * F,) and shared (S,), so that the places of a neuron add up to it.

    A chosen expert of E equally likely ones weighs 1/E, and A/E of the places are chosen (with `norm_topk` 1/A); the shared one
    passes through a gate of a half. A neuron that only one side holds is wholly that side's.
    """
    held_routed, held_shared = routed.bincount(minlength=ffn), shared.bincount(minlength=ffn)  # (H,) places that hold a neuron
    of_shared = torch.full((ffn,), shared_share, dtype=torch.float64)
    of_shared[held_shared == 0] = 0.0
    of_shared[held_routed == 0] = 1.0
    per_place = 1 / moe.experts if moe.norm_topk else moe.active / moe.experts**2  # mean weight of a place over all tokens
    scale_routed = (1 - of_shared) / (held_routed.clamp(min=1) * per_place)
    scale_shared = of_shared / (held_shared.clamp(min=1) * GATE_AT_ZERO)
    return scale_routed[routed].float(), scale_shared[shared].float()


def _mixture(dense: Part, config: ModelConfig, how: Upcycling, generator: torch.Generator) -> dict[str, Tensor]:
    """One layer's parameters by their names behind `mlp.`."""
    moe = config.moe
    assert moe is not None, "made by Upcycling.config"
    routed, shared = slots(config.ffn, moe.experts * moe.expert_ffn, generator), slots(config.ffn, moe.shared_ffn, generator)
    scale_routed, scale_shared = torch.ones(len(routed)), torch.ones(len(shared))
    if how.scale:
        scale_routed, scale_shared = neuron_scales(routed, shared, config.ffn, moe, how.shared_share)
    gate, up, down = _taken(dense, routed, scale_routed)
    experts = []
    for rows in torch.arange(len(routed)).split(moe.expert_ffn):
        experts.append(_drawn_anew((gate[rows], up[rows], down[:, rows]), how, generator))
    shared_gate, shared_up, shared_down = _taken(dense, shared, scale_shared)
    router_std = config.init_range if how.router_std is None else how.router_std
    return {
        "gate.weight": torch.empty(moe.experts, config.hidden).normal_(generator=generator) * router_std,
        "experts.gate_up_proj": torch.stack([torch.cat((gate, up)) for gate, up, _ in experts]),  # (E, 2F, D)
        "experts.down_proj": torch.stack([down for _, _, down in experts]),  # (E, D, F)
        "shared_expert.gate_proj.weight": shared_gate,
        "shared_expert.up_proj.weight": shared_up,
        "shared_expert.down_proj.weight": shared_down,
        "shared_expert_gate.weight": torch.zeros(1, config.hidden),
    }


def _taken(dense: Part, neurons: Tensor, scale: Tensor) -> Part:
    """The dense part's neurons in that order, each one's output multiplied by its scale: half of it in up, half in down."""
    gate, up, down = dense
    root = scale.sqrt()
    return gate[neurons], up[neurons] * root[:, None], down[:, neurons] * root


def _drawn_anew(expert: Part, how: Upcycling, generator: torch.Generator) -> Part:
    """Step 4: `reinit` of the expert's parameters, exactly that many, replaced by normal numbers."""
    gate, up, down = expert
    if how.reinit == 0:
        return expert
    if how.unit == "neuron":
        lost = _chosen(len(gate), how.reinit, generator)
        masks = (lost[:, None].expand_as(gate), lost[:, None].expand_as(up), lost.expand_as(down))
    else:
        masks = tuple(_chosen(part.numel(), how.reinit, generator).view(part.shape) for part in expert)  # type: ignore[assignment]
    fresh = []
    for part, mask in zip((gate, up, down), masks, strict=True):
        std = part.std() if how.reinit_std is None else how.reinit_std
        fresh.append(torch.where(mask, torch.empty_like(part).normal_(generator=generator) * std, part))
    return fresh[0], fresh[1], fresh[2]


def _chosen(count: int, share: float, generator: torch.Generator) -> Tensor:
    """A mask (count,) of that share of places, as near as whole places allow."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[: round(share * count)]] = True
    return mask
