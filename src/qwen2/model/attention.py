"""Attention without a cache: causal inside each sequence of a ragged batch, for training and scoring.

An `attend` callable is what differs between the uses of the one decoder. It is made once per step, knows every token's position,
receives unrotated q and k, and owns rotation, cache and attention. The one here keeps no cache; the engine's does.
"""

# N tokens of a ragged batch, B sequences, T tokens of one, H heads, K kv heads, d head size

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

from qwen2.model.rope import Rope, rotate
from qwen2.model.training import RotatedAttention, attended

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwen2.config import ModelConfig

BLOCK = 64  # tokens; lengths are filled up to a multiple of it


class Attend(Protocol):
    """q (N, H, d), k and v (N, K, d), unrotated, of one layer -> the attended values (N, H * d)."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def packed_attend(config: ModelConfig, positions: Tensor, lengths: Sequence[int]) -> Attend:
    """Causal attention inside sequences of `lengths` tokens that lie end to end; `positions` (N,) on the tokens' device.

    Raises ValueError where the lengths do not add up to the number of positions.
    """
    if sum(lengths) != len(positions):
        raise ValueError(f"lengths add up to {sum(lengths)} tokens, but there are {len(positions)} positions")
    rope = Rope(config, positions.device)
    buckets = Buckets(lengths, positions.device)
    counts = torch.tensor([length for length in lengths if length], dtype=torch.int32)
    tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}  # the first layer's call decides, the others reuse

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        by_kernels = attended(q, k, v)
        dtype = torch.float32 if by_kernels else q.dtype
        if dtype not in tables:
            tables[dtype] = rope.tables(positions, dtype)
        cos, sin = tables[dtype]
        if by_kernels:
            out: Tensor = RotatedAttention.apply(q, k, v, cos, sin, counts)
            return out
        return buckets(rotate(q, cos, sin), rotate(k, cos, sin), v)

    return attend


def causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Softmax over each token's own and earlier keys of its sequence; q (N, H, d), k and v (N, K, d) -> (N, H * d)."""
    return Buckets(lengths, q.device)(q, k, v)


class Buckets:
    """Sequences of unlike lengths in few calls of torch's fused attention: those that need as many blocks of 64 tokens go together.

    Shorter ones are filled up behind their end, where a causal mask lets no token of theirs look; what a sequence gets has the
    same bits whatever the others hold.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.shapes: list[tuple[int, int]] = []  # (B, T) of each bucket
        self.rows: Tensor | None = None  # (M,): which of the N tokens lies at each place of the buckets
        self.places: Tensor | None = None  # (N,): where each token lies
        if len(set(lengths)) <= 1:
            self.shapes.append((len(lengths), max(lengths, default=0)))
            return
        starts = torch.tensor([0, *lengths]).cumsum(0)
        by_blocks: dict[int, list[int]] = {}
        for piece, length in enumerate(lengths):
            by_blocks.setdefault(-(-length // BLOCK) * BLOCK, []).append(piece)
        places = torch.empty(int(starts[-1]), dtype=torch.int64)
        rows, filled = [], 0
        for length, pieces in sorted(by_blocks.items()):
            self.shapes.append((len(pieces), length))
            for piece in pieces:
                first, count = int(starts[piece]), lengths[piece]
                places[first : first + count] = torch.arange(filled, filled + count)
                rows.append(torch.arange(first, first + length).clamp_(max=first + max(count - 1, 0)))
                filled += length
        self.rows, self.places = torch.cat(rows).to(device), places.to(device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, d), k and v (N, K, d) -> (N, H * d)."""
        if self.rows is None or self.places is None:
            return _equal_lengths(q, k, v, self.shapes[0][0])
        sizes = [count * length for count, length in self.shapes]
        split_q, split_k, split_v = (x.index_select(0, self.rows).split(sizes) for x in (q, k, v))
        counts = [count for count, _ in self.shapes]
        out = torch.cat(list(map(_equal_lengths, split_q, split_k, split_v, counts)))
        return out.index_select(0, self.places)


def _equal_lengths(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
    """`sequences` (B) of the same length T: one call of torch's fused attention, (B * T, H * d) back."""
    q_BHTd, k_BKTd, v_BKTd = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_BHTd, k_BKTd, v_BKTd, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(len(q), -1)
