"""Where keys and values lie: blocks of 64 consecutive tokens, all layers and heads of them, cut from larger slabs.

Two kinds of memory stand behind them. The kernels keep integers of 16 or 8 bits with one scale per token and head
(kernels/cache.h): at equal size 16 bits are finer than fp16, and no key is too large for them. In plain torch a block is a tensor
of the compute type, and so it is where 32 bits are asked for. A slab is given back to the system when none of its blocks is in use
and another has room.
Left out: what the blocks hold and who may have them (kv_cache.py).
"""

# L layers, K kv heads, d head size

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwen2.kernels.calls import native
from qwen2.kernels.matrix import large_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2.config import ModelConfig

BLOCK = 64  # tokens: QWEN2_CACHE_BLOCK of kernels.h
CACHE_BITS = (32, 16, 8)
SLAB = 8 << 20  # bytes, or one block if that is larger


class Block:
    """Memory for 64 tokens. `refs` sequences hold it; what it holds can be found by others once `tokens` says so (kv_cache.py)."""

    __slots__ = ("address", "chain", "memory", "parent", "refs", "slab", "tokens")

    def __init__(self, memory: Any, address: int, slab: Slab) -> None:
        self.memory, self.address, self.slab = memory, address, slab
        self.refs = 0
        self.tokens: tuple[int, ...] = ()  # while it can be found
        self.parent = self.chain = 0  # of the text before it, and of the text up to its end


class Slab:
    """Blocks that were allocated together; `taken` of them are in use."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.taken = 0


class KernelMemory:
    """Blocks as the kernels read them; their attention takes addresses."""

    def __init__(self, config: ModelConfig, bits: int) -> None:
        self.bits = bits
        self.layer_bytes = config.kv_heads * int(native().qwen2_cache_bytes(config.head_dim, bits))
        self.block_bytes = config.layers * self.layer_bytes
        self.name = f"kernels, {bits} bits"

    def slab(self) -> Slab:
        """Fresh blocks."""
        slab, step = Slab(), -(-self.block_bytes // 64) * 64
        whole = large_pages(max(step, SLAB))
        for start in range(0, len(whole) - step + 1, step):
            memory = whole[start : start + self.block_bytes]
            slab.blocks.append(Block(memory, memory.ctypes.data, slab))
        return slab

    @staticmethod
    def copy(source: Block, target: Block) -> None:
        """All that one block holds, into another."""
        target.memory[:] = source.memory


class TensorMemory:
    """Blocks as tensors (L, 2, K, 64, d), keys first, of rotated keys."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (config.layers, 2, config.kv_heads, BLOCK, config.head_dim)
        self.dtype, self.device = dtype, device
        self.block_bytes = 2 * config.layers * config.kv_heads * BLOCK * config.head_dim * dtype.itemsize
        self.name = f"torch, {dtype}"

    def slab(self) -> Slab:
        """Fresh blocks."""
        slab = Slab()
        whole = torch.empty(max(1, SLAB // self.block_bytes), *self.shape, dtype=self.dtype, device=self.device)
        slab.blocks = [Block(memory, memory.data_ptr(), slab) for memory in whole]
        return slab

    @staticmethod
    def copy(source: Block, target: Block) -> None:
        """All that one block holds, into another."""
        target.memory.copy_(source.memory)


class NoRoomError(MemoryError):
    """Every block that may exist is in use."""


class BlockPool:
    """At most `limit` blocks; those not in use are free, and taken before a new slab is made."""

    def __init__(self, memory: KernelMemory | TensorMemory, limit: int) -> None:
        self.memory, self.limit = memory, limit
        self.taken = 0
        self.free: list[Block] = []

    def take(self) -> Block:
        """A block that nobody has, its content undefined. NoRoomError where all are taken."""
        if self.taken >= self.limit:
            raise NoRoomError(f"all {self.limit} blocks of the cache are in use")
        if not self.free:
            self.free.extend(reversed(self.memory.slab().blocks))
        block = self.free.pop()
        block.slab.taken += 1
        self.taken += 1
        return block

    def give(self, block: Block) -> None:
        """Back to the free ones; a slab of which nothing is in use goes, if there is room in another."""
        slab = block.slab
        slab.taken -= 1
        self.taken -= 1
        self.free.append(block)
        if slab.taken == 0 and len(self.free) > len(slab.blocks):
            self.free = [other for other in self.free if other.slab is not slab]

    def check(self, taken: Sequence[Block]) -> None:
        """RuntimeError unless exactly these are taken, and every other one is free."""
        blocks = {id(block): block for block in (*taken, *self.free)}
        if len(blocks) != len(taken) + len(self.free):
            raise RuntimeError("a block of the cache is free and in use, or twice the one or the other")
        if len(taken) != self.taken:
            raise RuntimeError(f"{self.taken} blocks are counted as taken, {len(taken)} are held")
        for slab in {id(block.slab): block.slab for block in blocks.values()}.values():
            if any(id(block) not in blocks for block in slab.blocks):
                raise RuntimeError("a block of the cache is neither free nor in use")
