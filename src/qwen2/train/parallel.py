"""The decoder's arithmetic when ranks share it: rows gathered and reduced, experts spread, keys and values of a divided context.

Every rank owns rows of the residual stream. Tensor ranks gather each other's rows before the products that are divided among them, and
reduce the partial sums back to each one's rows (sequence parallel, arXiv 2205.05198, section 4.2); expert ranks send rows to where their
expert is, and back; context ranks gather keys and values inside `attend`. All arithmetic is done on plain local tensors, by the same
modules as in one process: `local_class` lets a module read its own part of a parameter that is divided as a DTensor.

What is left out: overlapping these exchanges with arithmetic, and who belongs to which group (distributed.py).
"""

# N tokens of a micro-batch, n rows of this rank, D hidden, H heads, K kv heads, d head size, E experts, A active, M rows that arrived

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.attention.bias import causal_lower_right

from qwen2.model.attention import Buckets
from qwen2.model.moe import Experts
from qwen2.model.qwen2 import MLP, Attention, RMSNorm
from qwen2.model.rope import Rope, rotate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2.config import ModelConfig
    from qwen2.model.adapted import AdaptedRows
    from qwen2.model.attention import Attend

Group = Any  # torch.distributed.ProcessGroup
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # their names since and before torch 2.13
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gather(torch.autograd.Function):
    """(n, ...) of each rank -> (size * n, ...), in the order of ranks; the gradients of all ranks are summed on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return reduced(gradients[0], ctx.group), None


class Reduce(torch.autograd.Function):
    """Partial sums (size * n, ...) -> this rank's rows of their sum (n, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduced(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gathered(gradients[0], ctx.group), None


class Exchange(torch.autograd.Function):
    """Rows for the ranks of a group end to end, `sent` to each -> the rows that they had for this one, `received` of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return exchanged(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return exchanged(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


def gathered(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    ALL_GATHER(out, x.contiguous(), group=group)
    return out


def reduced(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
    REDUCE_SCATTER(out, x.contiguous(), group=group)
    return out


def exchanged(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


@cache
def local_class(kind: Any, names: tuple[str, ...]) -> Any:
    """The class whose parameters `names` read as this rank's part, where they are divided over tensor or expert ranks.

    The gradient of one that all ranks of the group hold alike is a sum over them, each having rows of its own: partial here. While
    FSDP has not gathered a parameter its mesh has a second dimension, and it is read as it is.
    """

    def reader(name: str) -> property:
        def read(self: nn.Module) -> Tensor | None:
            parameter: Any = self._parameters[name]
            if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:
                return parameter
            placements = [Partial() if isinstance(place, Replicate) else place for place in parameter.placements]
            return parameter.to_local(grad_placements=placements)

        return property(read)

    return type(f"Local{kind.__name__}", (kind,), {name: reader(name) for name in names})


class TensorAttention(Attention):
    """Attention with the heads divided over `group`; x (n, D) are own rows, the heads see all of the group's."""

    group: Group

    def forward(self, x: Tensor, norm: RMSNorm, attend: Attend, adapted: AdaptedRows | None = None) -> Tensor:
        assert adapted is None, "adapters of rows are for networks that answer"
        rows = Gather.apply(norm(x), self.group)  # (T * n, D)
        q, k, v = (layer(rows).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return x + Reduce.apply(self.o_proj(attend(self.layer, q, k, v)), self.group)


class TensorMLP(MLP):
    """The feed-forward part with its width divided over `group`."""

    group: Group

    def forward(self, x: Tensor, norm: RMSNorm, router_logits: list[Tensor] | None = None, adapted: AdaptedRows | None = None) -> Tensor:
        return x + self.plain(norm(x), adapted)

    def plain(self, x: Tensor, adapted: AdaptedRows | None = None) -> Tensor:
        assert adapted is None, "adapters of rows are for networks that answer"
        return Reduce.apply(super().plain(Gather.apply(x, self.group)), self.group)


class SpreadExperts(Experts):
    """The experts of a layer spread over `group`, as many on each rank; rows travel to their expert and back."""

    group: Group

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (n, D), chosen experts among all E and their weights (n, A) -> the weighted sums (n, D)."""
        ranks, own = dist.get_world_size(self.group), len(self.down_proj)
        order = chosen.flatten().argsort(stable=True)  # (n * A,): by expert, so by rank too
        counts = torch.bincount(chosen.flatten(), minlength=ranks * own)  # (E,)
        arriving = exchanged(counts, [own] * ranks, [own] * ranks, self.group).view(ranks, own)
        sent, received = counts.view(ranks, own).sum(1).tolist(), arriving.sum(1).tolist()
        rows = order // chosen.shape[1]
        arrived = Exchange.apply(x[rows], sent, received, self.group)  # (M, D)
        experts = torch.arange(own, device=x.device).repeat(ranks).repeat_interleave(arriving.flatten())  # (M,)
        y = super().forward(arrived, experts[:, None], weights.new_ones(len(arrived), 1))
        if not len(arrived):  # all ranks go the same ways backward, rows or none: to the senders, and to the weights, whose gradients are 0
            y = arrived + 0.0 * (self.gate_up_proj.sum() + self.down_proj.sum())
        back = Exchange.apply(y, received, sent, self.group)
        return torch.zeros_like(x).index_add(0, rows, (back * weights.flatten()[order, None]).to(x.dtype))


def pieces_of(rank: int, ranks: int, rows: int) -> list[tuple[int, int]]:
    """The spans of rows of a context rank: two pieces from either end, so that each rank has about as many keys to look at."""
    if ranks == 1:
        return [(0, rows)]
    size = rows // (2 * ranks)
    return [(place * size, (place + 1) * size) for place in (rank, 2 * ranks - 1 - rank)]


def rows_of(rank: int, ranks: int, rows: int) -> Tensor:
    """The numbers of these rows."""
    return torch.cat([torch.arange(*piece) for piece in pieces_of(rank, ranks, rows)])


def context_attend(config: ModelConfig, positions: Tensor, lengths: Sequence[int], group: Group) -> Attend:
    """Causal attention where each rank of `group` has the rows `rows_of` it: keys and values are gathered, queries stay.

    `positions` (N,) and `lengths` are of the whole micro-batch. `attend` takes q (n, H, d), k and v (n, K, d) of this rank's rows.
    """
    rank, ranks, N = dist.get_rank(group), dist.get_world_size(group), len(positions)
    own = positions[rows_of(rank, ranks, N).to(positions.device)]
    order = torch.cat([rows_of(other, ranks, N) for other in range(ranks)]).argsort().to(positions.device)
    pieces = [Piece(start, stop, lengths, positions.device) for start, stop in pieces_of(rank, ranks, N)]
    rope = Rope(config, positions.device)
    tables: dict[object, tuple[Tensor, Tensor]] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype not in tables:
            tables[q.dtype] = rope.tables(own, q.dtype)
        q, k = rotate(q, *tables[q.dtype]), rotate(k, *tables[q.dtype])
        every = Gather.apply(torch.cat((k, v.to(k.dtype)), dim=1), group).index_select(0, order)  # (N, 2K, d)
        keys, values = every.chunk(2, dim=1)
        parts = q.split([len(piece) for piece in pieces])
        return torch.cat([piece(part, keys, values) for piece, part in zip(pieces, parts, strict=True)])

    return attend


class Piece:
    """Rows [start, stop) of a micro-batch as queries, of sequences of `lengths`: perhaps the rest of one that began before, then others."""

    def __init__(self, start: int, stop: int, lengths: Sequence[int], device: torch.device) -> None:
        self.start, self.stop, self.first, self.rest = start, stop, start, start
        others: list[int] = []
        begin = 0
        for length in lengths:
            end = min(begin + length, stop)
            if begin < start < end:
                self.first, self.rest = begin, end  # its keys begin at `first`; its queries are [start, rest)
            elif start <= begin < end:
                others.append(end - begin)
            begin += length
        self.others = Buckets(others, device)

    def __len__(self) -> int:
        return self.stop - self.start

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (stop - start, H, d), k and v (N, K, d) of all rows -> (stop - start, H * d)."""
        parts = []
        if self.rest > self.start:
            parts.append(continued(q[: self.rest - self.start], k[self.first : self.rest], v[self.first : self.rest]))
        if self.rest < self.stop:
            parts.append(self.others(q[self.rest - self.start :], k[self.rest : self.stop], v[self.rest : self.stop]))
        return torch.cat(parts)


def continued(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last len(q) tokens of one sequence look at all of it up to themselves: q (n, H, d), k and v (N, K, d) -> (n, H * d)."""
    q_1HTd, k_1KTd, v_1KTd = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = causal_lower_right(len(q), len(k))
    out = F.scaled_dot_product_attention(q_1HTd, k_1KTd, v_1KTd, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1).reshape(len(q), -1)
