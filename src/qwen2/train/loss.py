"""Cross-entropy of the next token from hidden states, a chunk of rows at a time: the N x V logits never exist.

A chunk's logits are made, its losses and the gradient with respect to them taken at once (by the kernels, in place, where there are
some), and then they are gone: three products of the head for forward and backward together, as many as with all logits in memory.
What is kept for the backward pass is the gradient of the hidden states and that of the head, which has to be made anyway.

Sums, not means: whoever knows the whole step divides by its number of targets. The z-loss keeps the normalisers near 1 (PaLM, arXiv
2204.02311, section 5): `z_loss` times the square of the logarithm of each row's normaliser.
Left out: label smoothing, and a head that is divided over ranks.

    total, count, metrics = cross_entropy(network, hidden, labels)
    (total / count).backward()
"""

# N tokens, D hidden, V vocabulary, C rows of a chunk

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen2.kernels import training
from qwen2.kernels.training import EntropyStruct
from qwen2.model.linear import gradient_to_input, product
from qwen2.model.training import computes, kind_of

if TYPE_CHECKING:
    from qwen2.model import Qwen2

IGNORE = -100  # a label that is no target
CHUNK_BYTES = 64 << 20  # of a chunk's logits in float32: large enough for fast products, small beside any model


def cross_entropy(network: Qwen2, hidden: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, int, dict[str, Tensor]]:
    """hidden (N, D), labels (N,) with -100 for rows that are no target -> the sum of losses, their number, what to report.

    The sum is a differentiable float32 scalar and has the z-loss in it; metrics: "nll", the sum without it, and "z", the sum of
    squared log-normalisers. Raises ValueError for a label outside the vocabulary.
    """
    weight: Tensor = network.head.weight  # type: ignore[assignment]
    rows = (labels != IGNORE).nonzero().squeeze(1)  # (n,): rows without a target cost nothing
    targets = labels[rows]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        raise ValueError(f"labels reach from {int(targets.min())} to {int(targets.max())}, the vocabulary has {len(weight)} tokens")
    chosen = hidden if len(rows) == len(labels) else hidden[rows]
    total, nll, z = ChunkedCrossEntropy.apply(chosen, weight, targets, z_loss)
    return total, len(rows), {"nll": nll, "z": z}


class ChunkedCrossEntropy(torch.autograd.Function):
    """(n, D), (V, D), (n,) -> the sum of losses with its gradients, the sum without z-loss, the sum of squared log-normalisers."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(hidden.dtype, torch.float32)  # what losses are computed in
        wants_hidden, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        sums = torch.zeros(2, dtype=wide, device=hidden.device)
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            for start in range(0, len(hidden), size := chunk_rows(len(weight))):
                chunk = slice(start, start + size)
                h_CD = hidden[chunk].to(dtype)
                logits = product(h_CD, head, None)  # (C, V)
                losses, log_z, gradient = entropy(logits, targets[chunk], z_loss, wants_hidden or wants_weight)
                sums += torch.stack([losses.sum(), log_z.square().sum()])
                if d_hidden is not None:
                    d_hidden[chunk] = gradient_to_input(gradient, head)
                if d_weight is not None and dtype == wide:
                    d_weight.addmm_(gradient.t(), h_CD)
                elif d_weight is not None:
                    d_weight += gradient.t() @ h_CD
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        nll, z = sums.unbind()
        ctx.mark_non_differentiable(nll, z)
        return nll + z_loss * z, nll, z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = gradients[0]
        return (
            None if d_hidden is None else d_hidden.mul_(scale),  # in place: a second backward pass is an error of torch's
            None if d_weight is None else d_weight.mul_(scale).to(ctx.weight_dtype),
            None,
            None,
        )


def entropy(logits: Tensor, targets: Tensor, z_loss: float, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and log-normalisers (C,) of logits (C, V), which are used up; and the gradient (C, V) in their type, where that is wanted."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    if computes(logits, targets):
        losses, log_z = torch.empty(2, len(logits)).unbind()
        at = [tensor.data_ptr() for tensor in (logits, targets, losses, log_z)]
        training.entropy_rows(EntropyStruct(*at, *logits.shape, float(wanted), z_loss, kind_of(logits.dtype)))
        return losses, log_z, logits
    log_z = (scores := logits.to(wide)).logsumexp(-1)
    losses = log_z - scores.gather(1, targets[:, None]).squeeze(1)
    if not wanted:
        return losses, log_z, logits
    gradient = scores.sub_(log_z[:, None]).exp_()  # the probabilities, in the logits' memory
    if z_loss:
        gradient *= (1 + 2 * z_loss * log_z)[:, None]
    gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
    return losses, log_z, gradient.to(logits.dtype)


def chunk_rows(vocab: int) -> int:
    """Rows whose logits fill a chunk, at least 16."""
    return max(16, CHUNK_BYTES // (4 * vocab))
