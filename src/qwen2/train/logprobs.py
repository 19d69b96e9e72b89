"""Log-probabilities of given tokens from hidden states, a chunk of rows at a time: the N x V logits never exist.

What preference training and RL need in place of a loss: a number a token, with whatever gradient comes back for each. A frozen head
(adapters) is multiplied twice in all: the gradient of the hidden states is known up to one factor a row, which the backward pass brings.
A head that is trained itself takes another two products, as its gradient needs those factors first: a chunk's logits are made again.

Left out: sums over answers, which are the caller's, and a head that is divided over ranks.

    logprobs = token_logprobs(network, hidden, rows, targets)             # (n,): row rows[i] of hidden says token targets[i]
"""

# N tokens, n of them scored, D hidden, V vocabulary, C rows of a chunk

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen2.model.linear import gradient_to_input, product
from qwen2.train.loss import chunk_rows, entropy

if TYPE_CHECKING:
    from qwen2.model import Qwen2


def token_logprobs(network: Qwen2, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """hidden (N, D), rows (n,) of it, which may repeat, the token that follows each (n,) -> log-probabilities (n,), float32 at least.

    Raises ValueError for a token outside the vocabulary.
    """
    weight: Tensor = network.head.weight  # type: ignore[assignment]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        raise ValueError(f"tokens reach from {int(targets.min())} to {int(targets.max())}, the vocabulary has {len(weight)}")
    found: Tensor = ChunkedLogprobs.apply(hidden[rows], weight, targets, torch.is_grad_enabled())
    return found


class ChunkedLogprobs(torch.autograd.Function):
    """(n, D), (V, D), (n,) -> (n,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, recorded: bool) -> Tensor:
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wants_hidden, ctx.wants_weight = (recorded and wanted for wanted in ctx.needs_input_grad[:2])
        d_losses = torch.empty_like(hidden) if wants_hidden and not ctx.wants_weight else None  # of each row's own loss
        found = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        with torch.autocast(device, enabled=False):
            head = weight.to(ctx.dtype)
            for chunk in chunks(hidden, weight):
                logits = product(hidden[chunk].to(ctx.dtype), head, None)  # (C, V)
                losses, _, gradient = entropy(logits, targets[chunk], 0.0, d_losses is not None)
                found[chunk] = -losses
                if d_losses is not None:
                    d_losses[chunk] = gradient_to_input(gradient, head)
        if recorded:
            ctx.save_for_backward(d_losses if d_losses is not None else hidden, weight, targets)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        saved, weight, targets = ctx.saved_tensors
        factors = -dout[:, None]  # (n, 1): a loss is a log-probability's negative
        if not ctx.wants_weight:
            return saved * factors.to(saved.dtype), None, None, None
        head, hidden = weight.to(ctx.dtype), saved
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for chunk in chunks(hidden, weight):
            h_CD = hidden[chunk].to(ctx.dtype)
            _, _, gradient = entropy(product(h_CD, head, None), targets[chunk], 0.0, True)
            d_hidden[chunk] = gradient_to_input(gradient, head) * factors[chunk]
            scaled = (h_CD * factors[chunk]).to(ctx.dtype)
            if ctx.dtype == d_weight.dtype:
                d_weight.addmm_(gradient.t(), scaled)
            else:
                d_weight += gradient.t() @ scaled
        return d_hidden if ctx.needs_input_grad[0] else None, d_weight.to(weight.dtype), None, None


def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Rows of hidden states whose logits fill a chunk each."""
    size = chunk_rows(len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
