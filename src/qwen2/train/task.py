"""What a job hands to the loop: batches, a loss, what to count, where the data stands.

Pre-training, fine-tuning, preference training and RL differ in these and in nothing else. A loss is a *sum* over the targets of a
micro-batch (tokens, or pairs, or answers: whatever `targets` counts); the loop divides by the count of the whole step, over all
micro-batches and ranks, so that every target weighs the same however a step is split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.model import Qwen2

B = TypeVar("B")
Sums = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Task(Generic[B]):
    """One job, as functions. `B` is its micro-batch.

    next_step: the micro-batches of the next step that this rank computes, as many on every rank.
    loss: of a micro-batch on its device, the differentiable sum, and further sums to report, each divided by the step's count.
    targets: how many a micro-batch has, as this rank computes it (`local`); tokens: how many it has as `next_step` gives it.
    local: a micro-batch, as this rank computes it (`World.local`).
    state, resume: where the data stands, as JSON can hold it, and going on from there.
    evaluate: what the weights are worth, by name; called with the network in evaluation mode and no gradients.
    evaluated: what the names are, where all have one measure, of which the mean is shown; empty where each has its own.
    flops: a token's, forward and backward, for utilisation.
    apart: whether a step with such a micro-batch has losses of another level, so that its spikes are told from steps of its kind alone.
    """

    next_step: Callable[[], Sequence[B]]
    loss: Callable[[Qwen2, B], tuple[Tensor, Sums]]
    targets: Callable[[B], int]
    tokens: Callable[[B], int]
    local: Callable[[B], B]
    state: Callable[[], dict[str, Any]]
    resume: Callable[[Mapping[str, Any]], object]
    evaluate: Callable[[Qwen2], Mapping[str, float]] | None = None
    evaluated: str = "bits per byte"
    flops: float = 0.0
    apart: Callable[[B], bool] | None = None
