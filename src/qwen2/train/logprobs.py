"""Log-probabilities of given tokens from hidden states, a chunk of rows at a time: the N x V logits never exist.

What preference training and RL need in place of a loss: a number a token, with whatever gradient comes back for each. Where the head
does not learn (adapters elsewhere, packed weights) it is multiplied by twice in all: the gradient of the hidden states is known up to one
factor a row, which the backward pass brings. A head that is trained, or has an adapter, takes two products more, since its gradient
needs those factors first: a chunk's logits are made again.

Left out: sums over answers, which are the caller's, and a head that is divided over ranks.

    logprobs = token_logprobs(network, hidden, rows, targets)             # (n,): row rows[i] of hidden says token targets[i]
"""

# N tokens, n of them scored, D hidden, V vocabulary, C rows of a chunk, r rank of an adapter

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen2.train.loss import add_product, entropy, head_of, head_parts, logits_of

if TYPE_CHECKING:
    from qwen2.model import Qwen2


def token_logprobs(network: Qwen2, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """hidden (N, D), rows (n,) of it, which may repeat, the token that follows each (n,) -> log-probabilities (n,), float32 at least.

    Raises ValueError for a token outside the vocabulary.
    """
    vocab = network.config.vocab
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise ValueError(f"tokens reach from {int(targets.min())} to {int(targets.max())}, the vocabulary has {vocab}")
    chosen = hidden[rows]
    found: Tensor = ChunkedLogprobs.apply(chosen, *head_parts(network.head, chosen), targets, network.head, torch.is_grad_enabled())
    return found


class ChunkedLogprobs(torch.autograd.Function):
    """Hidden states (n, D), a head as `ChunkedCrossEntropy` takes it, targets (n,) -> (n,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, inner: Tensor | None, b: Tensor | None, targets: Tensor, layer: Any, recorded: bool
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wants = [recorded and wanted for wanted in ctx.needs_input_grad[:4]]
        d_losses = torch.empty_like(hidden) if wants == [True, False, False, False] else None  # the gradient of each row's own loss
        found = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        with torch.autocast(device, enabled=False):
            head, b_typed = head_of(weight, layer, not wants[1], dtype), None if b is None else b.to(dtype)
            for start in range(0, len(hidden), head.rows):
                chunk = slice(start, start + head.rows)
                middle = None if inner is None else inner[chunk].to(dtype)
                logits = logits_of(head, hidden[chunk].to(dtype), middle, b_typed)  # (C, V)
                losses, _, gradient = entropy(logits, targets[chunk], 0.0, d_losses is not None)
                found[chunk] = -losses
                if d_losses is not None:
                    d_losses[chunk] = head.to_hidden(gradient)
                del logits, gradient  # before the next chunk's are made
        if recorded:
            ctx.save_for_backward(*((d_losses,) if d_losses is not None else (hidden, weight, inner, b, targets)))
            ctx.wants, ctx.dtype, ctx.layer = wants, dtype, layer
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        factors = -dout[:, None]  # (n, 1): a loss is a log-probability's negative
        if len(ctx.saved_tensors) == 1:
            (d_losses,) = ctx.saved_tensors
            return d_losses * factors.to(d_losses.dtype), *[None] * 6
        hidden, weight, inner, b, targets = ctx.saved_tensors
        wide, given = torch.promote_types(hidden.dtype, torch.float32), (hidden, weight, inner, b)
        d_hidden, d_weight, d_inner, d_b = into = [
            torch.zeros_like(x, dtype=wide if x is weight or x is b else x.dtype) if wanted else None
            for x, wanted in zip(given, ctx.wants, strict=True)
        ]
        head, b_typed = head_of(weight, ctx.layer, d_weight is None, ctx.dtype), None if b is None else b.to(ctx.dtype)
        for start in range(0, len(hidden), head.rows):
            chunk = slice(start, start + head.rows)
            h_CD, middle = hidden[chunk].to(ctx.dtype), None if inner is None else inner[chunk].to(ctx.dtype)
            _, _, gradient = entropy(logits_of(head, h_CD, middle, b_typed), targets[chunk], 0.0, True)
            if d_hidden is not None:
                d_hidden[chunk] = head.to_hidden(gradient) * factors[chunk]
            if d_inner is not None and b_typed is not None:
                d_inner[chunk] = gradient @ b_typed * factors[chunk]
            for total, x in ((d_weight, h_CD), (d_b, None if inner is None else inner[chunk])):
                if total is not None and x is not None:
                    add_product(total, gradient, (x * factors[chunk]).to(ctx.dtype))
            del gradient  # before the next chunk's is made
        return *(None if x is None else x.to(like.dtype) for x, like in zip(into, given, strict=True)), None, None, None
