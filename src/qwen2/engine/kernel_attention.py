"""Attention over blocks of the cache by the kernels: the native counterpart of attention.py.

An `attend` callable is built once per step: positions, rotation tables and the sequences' blocks are shared by all layers. A layer
is one native call for all sequences, long prompts and single tokens alike, which rotates, writes the cache and attends. Each
token's result has the same bits in any batch and after any split of its prompt.
"""

# N tokens of the step, H heads, K kv heads, d head size

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qwen2.engine.blocks import BLOCK
from qwen2.kernels.calls import AttentionStruct, address, check, i32, native

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.config import ModelConfig
    from qwen2.engine.blocks import BlockSequence
    from qwen2.model.attention import Attend
    from qwen2.model.rope import Rope


def kernel_attend(config: ModelConfig, rope: Rope, spans: Sequence[tuple[BlockSequence, int]]) -> Attend:
    """For one step: `spans` are the sequences in the batch's order, each with its number n of new tokens."""
    for sequence, n in spans:
        sequence.reserve(len(sequence) + n)
    positions = torch.tensor([position for sequence, n in spans for position in range(len(sequence), len(sequence) + n)])
    cos, sin = rope.tables(positions, torch.float32)  # (N, 1, d/2) each
    counts = (i32 * len(spans))(*(n for _, n in spans))
    histories = (i32 * len(spans))(*(len(sequence) for sequence, _ in spans))
    used = [place for sequence, n in spans for place in sequence.addresses[: -(-(len(sequence) + n) // BLOCK)]]
    blocks = (address * len(used))(*used)
    H, K, d = config.heads, config.kv_heads, config.head_dim
    layout = spans[0][0].layout
    width = (H + 2 * K) * d
    step = AttentionStruct(
        None, None, cos.data_ptr(), sin.data_ptr(), ctypes.addressof(counts), ctypes.addressof(histories), ctypes.addressof(blocks),
        width, H * d, 0, len(spans), H, K, d, layout.bits,
    )  # fmt: skip
    place, function = ctypes.addressof(step), native().qwen2_attend
    function.argtypes = [address]
    held = (cos, sin, counts, histories, blocks, step)  # alive as long as `attend` is

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert held[-1] is step
        if not side_by_side(q, k, v, width):
            q = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)  # from layers that were computed one by one
        out = torch.empty(len(v), H * d)
        step.qkv, step.out, step.offset = q.data_ptr(), out.data_ptr(), layer * layout.layer_bytes
        code = function(place)
        if code:
            check(code)
        return out

    return attend


def side_by_side(q: Tensor, k: Tensor, v: Tensor, width: int) -> bool:
    """Whether these are the columns of one matrix (N, width), as fused products leave them."""
    start, wide = q.data_ptr(), q.stride(0) == k.stride(0) == v.stride(0) == width
    return wide and k.data_ptr() == start + 4 * q[0].numel() and v.data_ptr() == start + 4 * (q[0].numel() + k[0].numel())
