"""What goes wrong inside a step, and what is said of it: numbers that are not finite, and losses that jump.

A loss or gradient that is not finite is traced: to a weight that is not, else to the first module of the forward pass whose output is
not, else to the parameters whose gradients are not. A spike is a loss far above the median of the last ones, in units of their
median deviation, so that a run's own noise decides what is far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwen2.train.precision import unrecorded

if TYPE_CHECKING:
    from qwen2.model import Qwen2

WINDOW = 64  # losses that a spike is measured by
ENOUGH = 16  # of them, before any is called one
NAMED = 3  # parameters named in a message
NORMAL = 1.4826  # the deviation of a normal distribution by its median absolute one
LEAST = 0.01  # a deviation is at least this share of the median: an even run has noise too


class TrainingError(ValueError):
    """A run that cannot go on: what happened, where, and what to do, in one line."""


class Spikes:
    """Watches the losses of a run; `recent` is its state."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def look(self, loss: float) -> str | None:
        """Words for a spike, which is not taken into the window; None for a loss like the others, which is."""
        if self.threshold and len(self.recent) >= ENOUGH:
            middle = median(self.recent)
            deviation = max(NORMAL * median(abs(one - middle) for one in self.recent), LEAST * abs(middle))
            far = (loss - middle) / deviation if deviation else 0.0
            if far > self.threshold:
                return f"the loss {loss:.4f} is {far:.0f} deviations above the recent median {middle:.4f}"
        self.recent.append(loss)
        return None


def first_bad(losses: Iterable[Tensor]) -> int | None:
    """The first micro-batch whose loss is not finite."""
    return next((number for number, loss in enumerate(losses) if not bool(torch.isfinite(loss))), None)


def trace(network: Qwen2, forward: Callable[[], Any], of_loss: bool) -> str:
    """Where numbers stop being finite: in the weights, in which module of the forward pass, or, if not `of_loss`, in which gradients."""
    weights = [name for name, p in network.named_parameters() if not finite(p.detach())]
    if weights:
        return f"weights that are not finite: {listed(weights)}"
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            if not found and isinstance(out, Tensor) and not finite(out):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        with unrecorded(network):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"all weights are finite, the output of {found[0]} is the first that is not"
    if of_loss:
        return "weights and outputs of all layers are finite: it is the loss itself"
    gradients = [name for name, p in network.named_parameters() if p.grad is not None and not finite(p.grad)]
    return f"weights and outputs are finite, gradients are not: {listed(gradients)}"


def finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor, or of this rank's part of it, are finite."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(local).all())


def listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
