"""Cross-entropy of the next token from hidden states, a chunk of rows at a time: the N x V logits never exist.

A chunk's logits are made, its losses and the gradient with respect to them taken at once (by the kernels, in place, where there are
some), and then they are gone: three products of the head for forward and backward together, as many as with all logits in memory.
What is kept for the backward pass is the gradient of the hidden states and that of the head, which has to be made anyway.

Sums, not means: whoever knows the whole step divides by its number of targets. The z-loss keeps the normalisers near 1 (PaLM, arXiv
2204.02311, section 5): `z_loss` times the square of the logarithm of each row's normaliser.
The head may be packed, and it may have an adapter. Left out: label smoothing, and a head that is divided over ranks.

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
from qwen2.model.training_frozen import adapter_of
from qwen2.quant.linear import BAND, PackedLinear, bands

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qwen2.model import Qwen2

IGNORE = -100  # a label that is no target
CHUNK_BYTES = 64 << 20  # of a chunk's logits in float32: large enough for fast products, small beside any model
BANDED_BYTES = 128 << 20  # of a chunk's logits where the head is unpacked for each chunk


def cross_entropy(network: Qwen2, hidden: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, int, dict[str, Tensor]]:
    """hidden (N, D), labels (N,) with -100 for rows that are no target -> the sum of losses, their number, what to report.

    The sum is a differentiable float32 scalar and has the z-loss in it; metrics: "nll", the sum without it, and "z", the sum of
    squared log-normalisers. Raises ValueError for a label outside the vocabulary.
    """
    head = network.head
    rows = (labels != IGNORE).nonzero().squeeze(1)  # (n,): rows without a target cost nothing
    targets = labels[rows]
    vocab = network.config.vocab
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise ValueError(f"labels reach from {int(targets.min())} to {int(targets.max())}, the vocabulary has {vocab} tokens")
    chosen = hidden if len(rows) == len(labels) else hidden[rows]
    weight, inner, b = head_parts(head, chosen)
    total, nll, z = ChunkedCrossEntropy.apply(chosen, weight, inner, b, targets, z_loss, head, torch.is_grad_enabled())
    return total, len(rows), {"nll": nll, "z": z}


def head_parts(head: Any, hidden: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The head's weight (V, D), None where it is packed; and of its adapter the middle (n, r), scaled, and B (V, r), if it has one."""
    adapter, packed = adapter_of(head), isinstance(head, PackedLinear)
    if adapter is None:
        return None if packed else head.weight, None, None
    if adapter.lora_magnitude_vector is not None:  # DoRA: whole, since every row has a factor of its own that learns
        return adapter.effective(head), None, None
    return None if packed else head.weight, adapter.scale * adapter.middle(hidden), adapter.lora_B


class ChunkedCrossEntropy(torch.autograd.Function):
    """Hidden states (n, D), a head (V, D), targets (n,) -> the sum of losses with its gradients, the sum without z-loss, the sum of
    squared log-normalisers. A head is a weight, or where that is None a packed layer, unpacked a band at a time; `inner` (n, r) and
    `b` (V, r), an adapter's, add their product to the logits. Gradients are computed where they are `recorded` only: what torch says of a
    parameter is the same in evaluation."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        inner: Tensor | None,
        b: Tensor | None,
        targets: Tensor,
        z_loss: float,
        layer: Any,
        recorded: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(hidden.dtype, torch.float32)  # what losses are computed in
        given, wants = (hidden, weight, inner, b), [recorded and wanted for wanted in ctx.needs_input_grad[:4]]
        types = (hidden.dtype, wide, hidden.dtype, wide)
        d_hidden, d_weight, d_inner, d_b = into = [
            torch.zeros_like(x, dtype=kind) if wanted and x is not None else None
            for x, kind, wanted in zip(given, types, wants, strict=True)
        ]
        sums = torch.zeros(2, dtype=wide, device=hidden.device)
        with torch.autocast(device, enabled=False):
            head = head_of(weight, layer, d_weight is None, dtype)
            b = None if b is None else b.to(dtype)
            for start in range(0, len(hidden), head.rows):
                chunk = slice(start, start + head.rows)
                h_CD, i_CR = hidden[chunk].to(dtype), None if inner is None else inner[chunk].to(dtype)
                logits = logits_of(head, h_CD, i_CR, b)  # (C, V)
                losses, log_z, gradient = entropy(logits, targets[chunk], z_loss, any(wants))
                sums += torch.stack([losses.sum(), log_z.square().sum()])
                if d_hidden is not None:
                    d_hidden[chunk] = head.to_hidden(gradient)
                if d_inner is not None and b is not None:
                    d_inner[chunk] = gradient @ b
                for total, x in ((d_weight, h_CD), (d_b, i_CR)):
                    if total is not None and x is not None:
                        add_product(total, gradient, x)
                del logits, gradient  # before the next chunk's are made
        ctx.save_for_backward(*into)
        ctx.dtypes = [None if x is None else x.dtype for x in given]
        nll, z = sums.unbind()
        ctx.mark_non_differentiable(nll, z)
        return nll + z_loss * z, nll, z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale, found = gradients[0], ctx.saved_tensors  # scaled in place: a second backward pass is an error of torch's
        scaled = (None if x is None else x.mul_(scale).to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True))
        return *scaled, None, None, None, None


def logits_of(head: Any, hidden: Tensor, inner: Tensor | None, b: Tensor | None) -> Tensor:
    """A chunk's hidden states (C, D), and of the head's adapter the middle (C, r) and B (V, r) in their type -> (C, V)."""
    logits: Tensor = head.logits(hidden)
    if inner is not None and b is not None:
        logits.addmm_(inner, b.t())
    return logits


def add_product(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Add gradient (C, V) times x (C, D) to total (V, D), which may be of a wider type."""
    if total.dtype == x.dtype:
        total.addmm_(gradient.t(), x)
    else:
        total += gradient.t() @ x


class PlainHead:
    """A weight (V, D), in the type that is computed with."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.rows = weight.to(dtype), chunk_rows(len(weight))

    def logits(self, hidden: Tensor) -> Tensor:
        """(C, D) -> (C, V)."""
        return product(hidden, self.weight, None)

    def to_hidden(self, gradient: Tensor) -> Tensor:
        """(C, V) -> (C, D)."""
        return gradient_to_input(gradient, self.weight)


class BandedHead:
    """A head (V, D) that is brought into the type that is computed with a band of rows at a time, so that no copy of it exists: packed,
    or frozen and of another type. Its chunks are larger, since each goes over all of it twice."""

    def __init__(self, rows: Callable[[], Iterator[Tensor]], vocab: int, dtype: torch.dtype) -> None:
        self.bands, self.vocab, self.dtype = rows, vocab, dtype
        self.rows = max(16, BANDED_BYTES // (dtype.itemsize * vocab))

    def logits(self, hidden: Tensor) -> Tensor:
        """(C, D) -> (C, V)."""
        out, start = hidden.new_empty(len(hidden), self.vocab), 0
        for band in self.bands():
            out[:, start : start + len(band)] = product(hidden, band.to(self.dtype), None)
            start += len(band)
        return out

    def to_hidden(self, gradient: Tensor) -> Tensor:
        """(C, V) -> (C, D) float32."""
        total, start = None, 0
        for band in self.bands():
            part = gradient_to_input(gradient[:, start : start + len(band)], band.to(self.dtype)).float()
            total = part if total is None else total.add_(part)
            start += len(band)
        assert total is not None, "a head has rows"
        return total


def head_of(weight: Tensor | None, layer: Any, frozen: bool, dtype: torch.dtype) -> PlainHead | BandedHead:
    """How the head is multiplied by: `weight` (V, D), or where that is None the packed `layer`'s."""
    if weight is None:
        return BandedHead(lambda: bands(layer.matrix), layer.out_features, dtype)
    if frozen and weight.is_cpu and weight.dtype != dtype and weight.numel() * dtype.itemsize > BANDED_BYTES:
        return BandedHead(lambda: iter(weight.split(max(1, BAND // weight.shape[1]))), len(weight), dtype)
    return PlainHead(weight, dtype)


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
