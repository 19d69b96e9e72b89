"""Losses of preference training, as pure functions of answers' log-probabilities: no network, no batch, no state.

What they take is said in each: *ratios* are log p(answer) - log p_reference(answer), *log-probabilities* the trained model's alone;
either is a sum over an answer's tokens or the mean over them. P pairs give P losses, not reduced, and every one is differentiable.

| loss | takes | reference model | source |
|---|---|---|---|
| dpo | ratios, sums; means for the length-normalised form | yes | arXiv 2305.18290 eq. 7; 2411.15124 section 5.1 (normalised) |
| ipo | ratios, means | yes | arXiv 2310.12036 eq. 17 |
| simpo | log-probabilities, means | no | arXiv 2405.14734 eq. 6 |
| odds | log-probabilities, means | no | arXiv 2403.07691 eq. 7; ORPO is `imitation` plus a share of it |
| kto | ratios, sums, of single answers | yes | arXiv 2402.01306 eq. 8 |
| imitation | log-probabilities, means | no | the SFT term of ORPO and of arXiv 2404.19733 |

Left out: the weights of several losses in one, which is the caller's addition.

    dpo(chosen, rejected, beta=0.1).mean().backward()
"""

# P pairs, A answers

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

CERTAIN = -1e-6  # a mean log-probability above this counts as this: the odds of a certain answer are infinite


def dpo(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """Ratios (P,), (P,) -> losses (P,): -log sigmoid(beta (chosen - rejected)).

    `smoothing` is the share of pairs that are held to be labelled the wrong way round (conservative DPO: E. Mitchell, "A note on DPO
    with noisy preferences", 2023, eq. 3). Sums of ratios make DPO, means its length-normalised form, which wants a larger `beta`.
    """
    return binary(beta * (chosen - rejected), smoothing)


def ipo(chosen: Tensor, rejected: Tensor, tau: float) -> Tensor:
    """Ratios (P,), (P,) -> losses (P,): (chosen - rejected - 1 / (2 tau))^2. Means, so that the target does not depend on lengths."""
    return (chosen - rejected - 1 / (2 * tau)).square()


def simpo(chosen: Tensor, rejected: Tensor, beta: float, margin: float, smoothing: float = 0.0) -> Tensor:
    """Mean log-probabilities (P,), (P,) -> losses (P,): -log sigmoid(beta (chosen - rejected) - margin); `margin` is the paper's gamma."""
    return binary(beta * (chosen - rejected) - margin, smoothing)


def odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean log-probabilities (P,), (P,) -> losses (P,): -log sigmoid(log odds(chosen) - log odds(rejected)).

    odds(p) = p / (1 - p) of the geometric mean p of an answer's tokens.
    """
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def kto(
    ratios: Tensor, wanted: Tensor, divergence: Tensor | float, beta: float, desirable: float = 1.0, undesirable: float = 1.0
) -> Tensor:
    """Ratios (A,) of single answers, whether each is wanted (A,) bool -> losses (A,).

    A wanted answer loses `desirable` times 1 - sigmoid(beta (ratio - divergence)), another `undesirable` times 1 - sigmoid(beta (divergence
    - ratio)). `divergence`, a number that no gradient goes through, is what `divergence_of` estimates.
    """
    ahead = torch.where(wanted, ratios - divergence, divergence - ratios)
    weights = torch.where(wanted, desirable, undesirable).to(ratios.dtype)
    return weights * torch.sigmoid(-beta * ahead)


def divergence_of(ratios: Tensor) -> Tensor:
    """Ratios (A,) of answers to *other* prompts than their own -> KTO's estimate of the KL divergence from the reference, at least 0."""
    return ratios.detach().mean().clamp(min=0)


def imitation(chosen: Tensor) -> Tensor:
    """Mean log-probabilities (P,) -> losses (P,): how unlikely the chosen answer's tokens are, as in supervised fine-tuning."""
    return -chosen


def binary(logits: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy of a preference whose log-odds are `logits` (P,), with labels that are right with 1 - `smoothing`."""
    right = -F.logsigmoid(logits)
    return right if smoothing == 0 else (1 - smoothing) * right - smoothing * F.logsigmoid(-logits)


def log_odds(logprobs: Tensor) -> Tensor:
    """log p - log(1 - p) from log p, without losing digits where p is near 1."""
    logprobs = logprobs.clamp(max=CERTAIN)
    return logprobs - torch.log(-torch.expm1(logprobs))
