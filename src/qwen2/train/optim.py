"""AdamW, its groups and schedules, clipping, and averaged weights.

Decay is decoupled (arXiv 1711.05101) and taken from matrices alone: norms, biases and the embedding, which is no map from one space
into another, are left as they are; an output head of its own is a matrix. The step is torch's fused one, on CPUs and GPUs.
Schedules are pure functions of the step, so that a resumed run needs none of their state: cosine, and warm-up, stable, decay (arXiv
2404.06395), whose stable part can be gone on with. Averages: exponential, or uniform over the run's tail.
Left out: other optimizers, and rates that differ by layer.

    optimizer = make_adamw(network, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1)
    set_rate(optimizer, 3e-4 * wsd(step, steps, warmup=100, decay=200, floor=0.0))
"""

from __future__ import annotations

from math import cos, pi, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

SCHEDULES = ("cosine", "wsd", "constant")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay pulls at this parameter: matrices, those of experts too, but the embedding."""
    return parameter.dim() >= 2 and "embed_tokens" not in name


def trained(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that want gradients, by name."""
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]


def make_adamw(network: nn.Module, beta1: float, beta2: float, eps: float, decay: float) -> torch.optim.AdamW:
    """The optimizer of all parameters that want gradients, in two groups; its rate is set before every step."""
    named = trained(network)
    groups = [
        {"params": [parameter for name, parameter in named if decays(name, parameter)], "weight_decay": decay},
        {"params": [parameter for name, parameter in named if not decays(name, parameter)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=(beta1, beta2), eps=eps, fused=True)
    for _, parameter in named:  # now rather than at the first step, so that a checkpoint has something to fill
        zeros = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def warm(step: int, warmup: int) -> float:
    """The share of the peak rate while it rises: step 0 has 1 / warmup, step warmup - 1 and all later ones have 1."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """The share of the peak rate: a linear rise over `warmup` steps, then half a cosine.

    `floor` would come after the last of `steps`, so that this one still learns where the floor is 0.
    """
    if step < warmup:
        return warm(step, warmup)
    progress = (step - warmup + 1) / (max(steps - warmup, 1) + 1)
    return floor + (1 - floor) * 0.5 * (1 + cos(pi * min(progress, 1.0)))


def wsd(step: int, steps: int, warmup: int, decay: int, floor: float) -> float:
    """The share of the peak rate: a linear rise, then the peak, in the last `decay` steps 1 - sqrt (arXiv 2405.18392).

    `floor` would come after the last of `steps`, so that this one still learns where the floor is 0.
    """
    if step < steps - decay:
        return warm(step, warmup)
    progress = min((step - (steps - decay) + 1) / (decay + 1), 1.0)
    return warm(step, warmup) * (floor + (1 - floor) * (1 - sqrt(progress)))


def rate_share(schedule: str, step: int, steps: int, warmup: int, decay: int, floor: float) -> float:
    """The share of the peak rate that `step` (from 0) of `steps` has. Raises ValueError for a schedule that is not known."""
    if schedule == "cosine":
        return cosine(step, steps, warmup, floor)
    if schedule == "wsd":
        return wsd(step, steps, warmup, decay, floor)
    if schedule == "constant":
        return warm(step, warmup)
    raise ValueError(f"schedule {schedule!r}: must be one of {', '.join(SCHEDULES)}")


@torch.no_grad()
def clip(parameters: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale all gradients by limit / norm where their `norm` is above the limit; of divided ones each rank its part."""
    gradients = [own_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory: all of it, unless it is divided (a DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Average:
    """A second set of the trained weights in float32: their exponential average, or their mean from some step on.

    `decay` is the exponential average's share that stays at each step; None takes the mean. `count` steps are in it.
    """

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        self.decay, self.count = decay, 0
        self.weights = {name: parameter.detach().clone() for name, parameter in trained(network)}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take one more step's weights in; the first are taken as they are."""
        share = 1 / (self.count + 1) if self.decay is None or self.count == 0 else 1 - self.decay
        current = [parameter.detach() for _, parameter in trained(network)]
        torch._foreach_lerp_(list(self.weights.values()), current, share)
        self.count += 1

    @torch.no_grad()
    def swap(self, network: nn.Module) -> None:
        """Exchange the network's weights and the average; twice is as before. Nothing is copied but the parts of divided ones."""
        for name, parameter in trained(network):
            if not hasattr(parameter, "to_local"):
                parameter.data, self.weights[name] = self.weights[name], parameter.data
            else:  # what is gathered of it is kept in the memory that it has now
                part, other = own_part(parameter), own_part(self.weights[name])
                kept = part.clone()
                part.copy_(other)
                other.copy_(kept)
