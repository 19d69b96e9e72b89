"""From answers' log-probabilities to what a step minimises and what a run says of itself: the loss that the settings ask for, built once.

Rewards are what a loss lets a model be paid by: beta times the ratio to the reference, or times the mean log-probability where there is
none. Accuracy counts pairs whose chosen answer has the higher one, ties half; the margin is the difference. For KTO, whose answers have no
partner, both are about the divergence: how far an answer lies on its side of it; and rewards are summed over wanted answers and over the
others, so that over `wanted` (and what is left of 1) they are means. A loss with an SFT term says that apart too, unweighted, as
`imitation`: what is left of the loss without its share is the preference's own.

    losses, sums = pairs_objective(settings)(sums, counts, reference)
"""

# P pairs, or single answers

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from qwen2.post.preference.losses import dpo, imitation, ipo, kto, odds, simpo

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.post.preference.settings import DpoSettings

Measured = tuple["Tensor", dict[str, "Tensor"]]  # losses (P,), and sums over them to report


def pairs_objective(settings: DpoSettings) -> Callable[[Tensor, Tensor, Tensor], Measured]:
    """The loss of pairs: sums of log-probabilities (P, 2), chosen first, counts of tokens (P, 2), the reference's sums (P, 2 or 0)."""
    s, beta = settings, settings.strength

    def measure(sums: Tensor, counts: Tensor, reference: Tensor) -> Measured:
        means = sums / counts
        scores = means if not s.has_reference else (sums - reference) / (counts if s.loss == "ipo" or s.length_normalised else 1)
        chosen, rejected = scores.unbind(1)
        if s.loss == "dpo":
            losses = dpo(chosen, rejected, beta, s.label_smoothing)
        elif s.loss == "ipo":
            losses = ipo(chosen, rejected, beta)
        elif s.loss == "simpo":
            losses = simpo(chosen, rejected, beta, s.margin, s.label_smoothing)
        else:
            assert s.loss == "orpo", s.loss
            losses = beta * odds(chosen, rejected)
        ahead = (beta * (chosen - rejected)).detach()
        said = {"accuracy": (ahead > 0).float() + 0.5 * (ahead == 0), "margin": ahead}
        if s.imitation:
            imitated = imitation(means[:, 0])
            losses, said["imitation"] = losses + s.imitation * imitated, imitated.detach()
        for side, name in enumerate(("chosen", "rejected")):
            said[f"reward_{name}"] = beta * scores[:, side].detach()
            said[f"logp_{name}"], said[f"length_{name}"] = sums[:, side].detach(), counts[:, side].float()
        return losses, {name: values.sum() for name, values in said.items()}

    return measure


def answers_objective(settings: DpoSettings) -> Callable[[Tensor, Tensor, Tensor, Tensor, float], Measured]:
    """KTO's loss of single answers: sums (P,), counts (P,), the reference's sums (P,), which are wanted (P,), the divergence."""
    s, beta = settings, settings.strength

    def measure(sums: Tensor, counts: Tensor, reference: Tensor, wanted: Tensor, divergence: float) -> Measured:
        ratios = sums - reference
        losses = kto(ratios, wanted, divergence, beta, s.desirable, s.undesirable)
        ahead = beta * torch.where(wanted, ratios - divergence, divergence - ratios).detach()
        said = {"accuracy": (ahead > 0).float() + 0.5 * (ahead == 0), "margin": ahead, "wanted": wanted.float()}
        said |= {"divergence": torch.full_like(ahead, divergence), "logp": sums.detach(), "length": counts.float()}
        rewards = beta * ratios.detach()
        said |= {"reward_wanted": rewards * wanted, "reward_unwanted": rewards * ~wanted}
        return losses, {name: values.sum() for name, values in said.items()}

    return measure
