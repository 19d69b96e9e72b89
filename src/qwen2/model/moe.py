"""Mixture of experts: fine-grained routed experts and one gated shared expert (Qwen2 report, section 2.2.2).

The router takes a softmax over all experts in float32, keeps the top ones and, unless the config says so, does not renormalise
their weights. Tokens are sorted by expert, each expert's rows go through its matrices in one product, and the weighted results
are added back: every row costs `active` experts, whatever the batch.

What is left out: capacity limits and dropped tokens (the released models have none) and sharding over devices.
"""

# N tokens, D hidden, E experts, A active experts a token, F expert feed-forward size

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from qwen2.model.linear import as_int8, linear

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from qwen2.config import MoEConfig


class Experts(nn.Module):
    """The routed experts, stacked: gate and up as (E, 2F, D), down as (E, D, F). `int8_input` as in `Linear`."""

    int8_input = False

    def __init__(self, hidden: int, moe: MoEConfig, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(moe.experts, 2 * moe.expert_ffn, hidden, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(moe.experts, hidden, moe.expert_ffn, dtype=dtype, device=device))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (N, D), chosen experts and their weights (N, A) -> the weighted sum of the experts' outputs (N, D)."""
        return by_expert(x, chosen, weights, len(self.down_proj), self.one)

    def one(self, expert: int, x: Tensor) -> Tensor:
        """One expert's SwiGLU on its rows (n, D) -> (n, D)."""
        rounded = as_int8 if self.int8_input and not torch.is_grad_enabled() else lambda x: x
        gate, up = linear(rounded(x), self.gate_up_proj[expert]).chunk(2, dim=-1)
        return linear(rounded(gated(gate, up)), self.down_proj[expert])


def by_expert(x: Tensor, chosen: Tensor, weights: Tensor, experts: int, one: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Sort the rows of x (N, D) by expert, let `one(expert, rows)` compute each group once, add the weighted results up (N, D)."""
    order = chosen.flatten().argsort(stable=True)  # (N * A,): places in `chosen`, sorted by expert
    rows_by_expert = order // chosen.shape[1]
    counts = torch.bincount(chosen.flatten(), minlength=experts).tolist()
    out = torch.zeros_like(x)
    for expert, (rows, places) in enumerate(zip(rows_by_expert.split(counts), order.split(counts), strict=True)):
        if len(rows):
            y = one(expert, x[rows]) * weights.flatten()[places, None]
            out = out.index_add(0, rows, y)
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; in the memory of `gate` where no gradient will ask for the factors."""
    if torch.is_grad_enabled():
        return F.silu(gate) * up
    return F.silu(gate, inplace=True).mul_(up)


def route(logits: Tensor, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """Router logits (N, E) -> weights (N, A) in float32 and chosen experts (N, A)."""
    weights, chosen = logits.float().softmax(-1).topk(moe.active, dim=-1)
    if moe.norm_topk:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen


def load_balancing_loss(router_logits: Sequence[Tensor], moe: MoEConfig, rows: Tensor | None = None) -> Tensor:
    """Switch-style balance loss (arXiv 2101.03961, eq. 4) over all layers' router logits, each (N, E); a scalar, 1 x A when even.

    E * sum over e of (share of tokens that chose e, summed over the A ranks) * (mean probability of e), as Qwen2's authors
    confirmed for training (huggingface/transformers#29377). `rows` (N,) numbers the row of each token, from 0: each row has a balance
    of its own (as in arXiv 2412.19437, section 2.1.2), and the result is their mean, weighed by their tokens, so that a sum over tokens
    is the same however rows are divided among calls. Tokens of row -1 are left out: padding, masked ones. Without `rows` all are of one.
    The gradient flows through the probabilities alone: the shares are counts. Multiply by `moe.aux_coef`.
    """
    logits = torch.stack(list(router_logits))  # (L, N, E)
    L, N, E = logits.shape
    rows = torch.ones(N, dtype=torch.int64, device=logits.device) if rows is None else rows + 1  # 0: what is left out
    sizes = torch.bincount(rows)  # (R,)
    probabilities = logits.float().softmax(-1)
    chosen = probabilities.topk(moe.active, dim=-1).indices  # (L, N, A)
    counts = torch.bincount((rows[:, None] * E + chosen).flatten(), minlength=len(sizes) * E).view(-1, E)  # (R, E)
    sums = probabilities.new_zeros(len(sizes), E).index_add(0, rows, probabilities.sum(0))
    balances = E * (counts * sums).sum(1) / (L * sizes.clamp(min=1)).square()  # (R,)
    return (sizes * balances)[1:].sum() / sizes[1:].sum()
