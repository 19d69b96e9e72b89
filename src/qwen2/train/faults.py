"""What goes wrong inside a step, and what is said of it: numbers that are not finite, and losses that jump.

A loss or gradient that is not finite is traced: to a weight that is not, else to the first module of the forward pass whose output is
not, else to the parameters whose gradients are not; of several ranks to the first that has it. A spike is a loss far above the median
of the last ones, in units of their median deviation, so that a run's own noise decides what is far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from qwen2.train.precision import unrecorded

if TYPE_CHECKING:
    from qwen2.model import Qwen2
    from qwen2.train.world import World

F = TypeVar("F", int, tuple[int, str])

WINDOW = 64  # losses that a spike is measured by
ENOUGH = 16  # of them, before any is called one
LASTING = 10  # in a row are no spikes any more
NAMED = 3  # parameters named in a message
NORMAL = 1.4826  # the deviation of a normal distribution by its median absolute one
LEAST = 0.01  # a deviation is at least this share of the median: an even run has noise too


class TrainingError(ValueError):
    """A run that cannot go on: what happened, where, and what to do, in one line."""


class Spike(NamedTuple):
    """A loss that jumped, in words; `lasting` where it is the last of a row that is taken for the run's new level."""

    text: str
    lasting: bool = False


class Spikes:
    """Watches the losses of a run; `recent` and `high` are its state: losses like the others, and those above them that came last.

    LASTING losses in a row that are called spikes are none: they are the run's new level, and the window begins anew with them.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.high: list[float] = []

    def look(self, loss: float) -> Spike | None:
        """A spike, which is not taken into the window; None for a loss like the others, which is."""
        text = self._far(loss)
        if text is None:
            self.high.clear()
            self.recent.append(loss)
            return None
        self.high.append(loss)
        if len(self.high) < LASTING:
            return Spike(text)
        self.restore(self.high, ())
        level = f"so were the {LASTING - 1} losses before it: this is the run's new level, by which spikes are told from here on"
        return Spike(f"{text}, and {level}", lasting=True)

    def _far(self, loss: float) -> str | None:
        if not self.threshold or len(self.recent) < ENOUGH:
            return None
        middle = median(self.recent)
        deviation = max(NORMAL * median(abs(one - middle) for one in self.recent), LEAST * abs(middle))
        far = (loss - middle) / deviation if deviation else 0.0
        return f"the loss {loss:.4f} is {far:.0f} deviations above the recent median {middle:.4f}" if far > self.threshold else None

    def restore(self, recent: Iterable[float], high: Iterable[float]) -> None:
        """Take up the state of another time."""
        self.recent, self.high = deque(recent, maxlen=WINDOW), list(high)


def trace(network: Qwen2, losses: Sequence[Tensor], forward: Callable[[int], object], world: World) -> str:
    """What is not finite, and where numbers stop being so: in the weights, in a module of the forward pass, or in gradients.

    `losses` of this rank's micro-batches; `forward` computes the one of that number again. Ranks that share a layer compute it together,
    so every rank has to call this; each looks at its own part, all go the same way, and the words are the same on all.
    """
    first, where = first_of(world.every(first_bad(losses)))
    what = "the gradients' norm" if first is None else f"the loss of micro-batch {first + 1} of {len(losses)}{where}"
    return f"{what} is not finite: {_cause(network, first, forward, world)}"


def _cause(network: Qwen2, first: int | None, forward: Callable[[int], object], world: World) -> str:
    weights, where = found_by(world, [name for name, p in network.named_parameters() if not finite(p.detach())])
    if weights:
        return f"weights that are not finite: {listed(weights)}{where}"
    output, where = first_of(world.every(first_bad_output(network, partial(forward, 0 if first is None else first))))
    if output is not None:
        return f"all weights are finite, the output of {output[1]} is the first that is not{where}"
    if first is not None:
        return "weights and outputs of all layers are finite: it is the loss itself"
    gradients, where = found_by(world, [name for name, p in network.named_parameters() if p.grad is not None and not finite(p.grad)])
    return f"weights and outputs are finite, gradients are not: {listed(gradients)}{where}"


def first_bad(losses: Iterable[Tensor]) -> int | None:
    """The first micro-batch whose loss is not finite."""
    return next((number for number, loss in enumerate(losses) if not bool(torch.isfinite(loss))), None)


def first_bad_output(network: Qwen2, forward: Callable[[], object]) -> tuple[int, str] | None:
    """The first module of a forward pass whose output is not finite: its place in the order in which they end, and its name."""
    ended = 0
    found: list[tuple[int, str]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            nonlocal ended
            ended += 1
            if not found and isinstance(out, Tensor) and not finite(out):
                found.append((ended, name))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        with unrecorded(network):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def first_of(found: Sequence[F | None]) -> tuple[F | None, str]:
    """The least of what each rank found, and on which rank it was, in words, where not all found some; None where none did."""
    ranks = [(one, rank) for rank, one in enumerate(found) if one is not None]
    if not ranks:
        return None, ""
    least, rank = min(ranks)
    return least, "" if len(ranks) == len(found) else f" on rank {rank}"


def found_by(world: World, names: list[str]) -> tuple[list[str], str]:
    """The names of the first rank that found any, and which rank that is, in words, where not all found some."""
    every = world.every(names)
    ranks = [rank for rank, some in enumerate(every) if some]
    if not ranks:
        return [], ""
    return every[ranks[0]], "" if len(ranks) == len(every) else f" on rank {ranks[0]}"


def finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor, or of this rank's part of it, are finite."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(local).all())


def listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
