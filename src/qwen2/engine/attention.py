"""Attention over the cache, for a ragged batch of sequences that each have a history.

An `attend` callable is built once per step: positions, rotation tables and masks are shared by all layers. It rotates, writes
the cache and attends sequence by sequence with torch's fused attention, which accumulates in float32:

- one new token: the heads of a group are the queries of their key head, no mask and no copied keys;
- a fresh prompt: causal;
- a later chunk of a prompt: a mask aligned to the lower right, in blocks of queries, so that it stays small.

Left out: dual chunk attention and sparse prefill, which bring `attend` callables of their own.
"""

# N tokens of the step, n of one sequence, T its tokens with history, H heads, K kv heads, G heads a kv head, d head size

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from qwen2.engine.blocks import BLOCK
from qwen2.model.rope import Rope, rotate

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.engine.kv_cache import BlockSequence
    from qwen2.model.attention import Attend

MASK_ELEMENTS = 2**22  # of one block of queries times keys


def cached_attend(rope: Rope, spans: Sequence[tuple[BlockSequence, int]], dtype: torch.dtype, device: torch.device) -> Attend:
    """For one step: `spans` are the sequences in the batch's order, each with its number n of new tokens and blocks for them."""
    positions = torch.cat([torch.arange(len(cache), len(cache) + n) for cache, n in spans])
    cos, sin = rope.tables(positions.to(device), dtype)  # (N, 1, d/2) each
    masks = [_masks(len(cache), n, device) if n > 1 and len(cache) else [] for cache, n in spans]
    if len(spans) == 1:
        (cache, _n), mask = spans[0], masks[0]

        def attend_one(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_sequence(rotate(q, cos, sin), *write(cache, layer, rotate(k, cos, sin), v), mask)

        return attend_one

    lengths = [n for _, n in spans]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qs, ks, vs = (torch.split(x, lengths) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        outputs = []
        for (cache, _), mask, q_n, k_n, v_n in zip(spans, masks, qs, ks, vs, strict=True):
            outputs.append(attend_sequence(q_n, *write(cache, layer, k_n, v_n), mask))
        return torch.cat(outputs)

    return attend


def write(cache: BlockSequence, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Store k and v (n, K, d) behind what is there; keys and values of the whole sequence (K, T, d), as copies."""
    start, end = len(cache), len(cache) + len(k)
    new = torch.stack((k, v)).transpose(1, 2)  # (2, K, n, d)
    blocks = [block.memory[layer] for block in cache.blocks[: -(-end // BLOCK)]]  # (2, K, 64, d) each
    for index in range(start // BLOCK, len(blocks)):
        first, last = max(start, index * BLOCK), min(end, (index + 1) * BLOCK)
        blocks[index][:, :, first - index * BLOCK : last - index * BLOCK] = new[:, :, first - start : last - start]
    keys, values = torch.cat(blocks, dim=2)[:, :, :end]
    return keys, values


def attend_sequence(q: Tensor, keys: Tensor, values: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """q (n, H, d) over keys and values (K, T, d), the queries being the last n of T -> (n, H * d)."""
    n, H, d = q.shape
    K = len(keys)
    keys, values = keys[None], values[None]  # (1, K, T, d)
    if n == 1:
        out = F.scaled_dot_product_attention(q.view(1, K, H // K, d), keys, values)  # (1, K, G, d): heads of a group are neighbours
        return out.reshape(1, H * d)
    grouped = K != H
    q = q.transpose(0, 1)[None]  # (1, H, n, d)
    if not masks:
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(n, H * d)
    blocks, start = [], 0
    for mask in masks:
        q_block, seen = q[:, :, start : start + len(mask)], mask.shape[1]
        blocks.append(F.scaled_dot_product_attention(q_block, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask, enable_gqa=grouped))
        start += len(mask)
    return torch.cat(blocks, dim=2).transpose(1, 2).reshape(n, H * d)


def _masks(history: int, n: int, device: torch.device) -> list[Tensor]:
    """Blocks of queries: each (rows, keys up to its last row's own) true where a query may look."""
    rows = max(1, MASK_ELEMENTS // (history + n))
    masks = []
    for start in range(0, n, rows):
        block = min(rows, n - start)
        mask = torch.ones(block, history + start + block, dtype=torch.bool, device=device)
        masks.append(mask.tril(history + start))  # row i sees keys 0 .. history + start + i
    return masks
