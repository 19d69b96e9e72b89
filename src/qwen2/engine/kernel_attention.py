"""Attention over blocks of the cache by the kernels: the native counterpart of attention.py.

An `attend` callable is built once per step: positions, rotation tables and the sequences' blocks are shared by all layers. A layer
is one native call for all sequences, long prompts and single tokens alike, which rotates, writes the cache and attends. Each
token's result has the same bits in any batch and after any split of its prompt.
"""

# N tokens of the step, H heads, K kv heads, d head size

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from qwen2.engine.blocks import BLOCK
from qwen2.kernels.calls import AttentionStruct, address, check, i32, native
from qwen2.quant.linear import bands

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.config import ModelConfig
    from qwen2.engine.kv_cache import BlockSequence
    from qwen2.model import Qwen2
    from qwen2.model.rope import Rope


class KernelAttend:
    """For one step: `spans` are the sequences in the batch's order, each with its number n of new tokens and blocks for them.

    `factors` (layers, K, d/2) are those of `key_factors`, the same for a sequence's whole life. `wanted` are the rows of the N whose
    hidden states somebody will look at, in order; None for all. `lanes` are those of the network's matrices, whose set attends.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: Rope,
        spans: Sequence[tuple[BlockSequence, int]],
        factors: Tensor | None = None,
        wanted: Sequence[int] | None = None,
        lanes: int = 0,
    ) -> None:
        self.wanted = wanted
        cos, sin = rope.rows([(len(sequence), n) for sequence, n in spans])  # (N, d/2) each
        counts = (i32 * len(spans))(*(n for _, n in spans))
        histories = (i32 * len(spans))(*(len(sequence) for sequence, _ in spans))
        used = [place for sequence, n in spans for place in sequence.addresses[: -(-(len(sequence) + n) // BLOCK)]]
        blocks = (address * len(used))(*used)
        H, K, d = config.heads, config.kv_heads, config.head_dim
        memory: Any = spans[0][0].memory
        self.width, self.values, self.layer_bytes = (H + 2 * K) * d, H * d, memory.layer_bytes
        self._struct = AttentionStruct(
            None, None, cos.data_ptr(), sin.data_ptr(), ctypes.addressof(counts), ctypes.addressof(histories), ctypes.addressof(blocks),
            None, self.width, self.values, 0, len(spans), H, K, d, memory.bits, lanes,
        )  # fmt: skip
        self._keep = (cos, sin, counts, histories, blocks, factors)
        self._factors = None if factors is None else factors.data_ptr()
        self._place, self._function = ctypes.addressof(self._struct), native().qwen2_attend

    def step(self, layer: int) -> int:
        """Address of the step's structure for this layer; a whole layer in one native call takes it (model/fused.py)."""
        self._struct.offset = layer * self.layer_bytes
        if self._factors is not None:
            self._struct.key_factors = self._factors + layer * self._struct.kv_heads * (self._struct.head_dim // 2) * 4
        return self._place

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, d), k and v (N, K, d), unrotated -> (N, H * d)."""
        if not side_by_side(q, k, v, self.width):
            q = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)  # from layers that were computed one by one
        out = torch.empty(len(v), self.values)
        self._struct.qkv, self._struct.out = q.data_ptr(), out.data_ptr()
        check(self._function(self.step(layer)))
        return out


def key_factors(network: Qwen2) -> Tensor:
    """What the keys of a cache of 8 bits are divided by before they are rounded, and the queries multiplied by: (layers, K, d/2).

    A key has one scale, set by its largest number, and in Qwen2 a few dimensions carry biases of tens to hundreds; the others would
    be lost in the rounding. With each pair of dimensions (one factor a pair, since rotation mixes its two) divided by the size to
    expect of it, all are rounded alike; that choice makes the error of the scores least. The size to expect comes from the weights:
    the bias, and twice the deviation of W diag(g) x for x of mean square one.
    """
    config = network.config
    sizes = []
    layers: Any = network.model.layers  # their types are not the annotated ones: modules were replaced by packed ones
    for layer in layers:
        proj = layer.self_attn.k_proj
        gain = layer.input_layernorm.weight.detach().float()
        deviation = torch.cat([(band * gain).square().sum(1).sqrt() for band in bands(proj.matrix)])
        size = 2 * deviation if proj.bias is None else 2 * deviation + proj.bias.detach().abs()
        pairs = size.view(config.kv_heads, 2, config.head_dim // 2).square().sum(1).sqrt()
        highest = pairs.amax(1, keepdim=True)
        sizes.append(torch.where(highest > 0, pairs.maximum(highest * 1e-4), 1.0))
    return torch.stack(sizes)


def side_by_side(q: Tensor, k: Tensor, v: Tensor, width: int) -> bool:
    """Whether these are the columns of one matrix (N, width), as fused products leave them."""
    start, wide = q.data_ptr(), q.stride(0) == k.stride(0) == v.stride(0) == width
    return wide and k.data_ptr() == start + 4 * q[0].numel() and v.data_ptr() == start + 4 * (q[0].numel() + k[0].numel())
