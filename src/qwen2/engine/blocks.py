"""A sequence's keys and values as the kernels keep them: a list of blocks, each of 64 consecutive tokens, all layers and heads of them.

Keys and values are integers of 16 or 8 bits with one scale per token and head (kernels/cache.h): at equal size 16 bits are finer
than fp16, and no key is too large for them. A full block is never written again, so sequences with the same beginning share it;
memory grows with use, block by block, and nothing is copied as it grows. Left out: who may keep how much (kv_cache.py).
"""

# T tokens of one sequence, L layers, K kv heads

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen2.kernels.calls import native
from qwen2.kernels.matrix import Arena

if TYPE_CHECKING:
    import numpy as np

    from qwen2.config import ModelConfig

BLOCK = 64  # tokens: QWEN2_CACHE_BLOCK of kernels.h
CACHE_BITS = (16, 8)
PIECE = 4 << 20  # bytes that blocks are cut from


class BlockLayout:
    """Sizes of one model's cache, and the memory that its blocks are cut from."""

    def __init__(self, config: ModelConfig, bits: int) -> None:
        self.bits = bits
        self.layer_bytes = config.kv_heads * int(native().qwen2_cache_bytes(config.head_dim, bits))
        self.block_bytes = config.layers * self.layer_bytes
        self.arena = Arena(PIECE)

    @property
    def token_bytes(self) -> int:
        """Memory of one token's keys and values, rounded up."""
        return -(-self.block_bytes // BLOCK)


class BlockSequence:
    """One sequence: the tokens that were read, and blocks with room for them and a few more."""

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        self.tokens: list[int] = []  # those whose keys and values are stored in every layer
        self.blocks: list[np.ndarray] = []  # block_bytes each
        self.addresses: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def reserve(self, total: int) -> None:
        """Make room for `total` tokens."""
        while len(self.blocks) * BLOCK < total:
            self._append(self.layout.arena.take(self.layout.block_bytes))

    def _append(self, block: np.ndarray) -> None:
        self.blocks.append(block)
        self.addresses.append(block.ctypes.data)

    def advance(self, tokens: Sequence[int]) -> None:
        """Count tokens in, once every layer has written them."""
        self.tokens.extend(tokens)
        assert len(self) <= len(self.blocks) * BLOCK, f"{len(self)} tokens in room for {len(self.blocks) * BLOCK}"

    def fork(self, length: int) -> BlockSequence:
        """The first `length` tokens as a sequence that goes its own way: full blocks shared, the last one copied where it is not full."""
        other = BlockSequence(self.layout)
        other.tokens = self.tokens[:length]
        full, rest = divmod(length, BLOCK)
        for block in self.blocks[:full]:
            other._append(block)
        if rest:
            other.reserve(length)
            other.blocks[full][:] = self.blocks[full]
        return other

    def held(self) -> dict[int, int]:
        """Memory by address, whether used yet or not; what is shared has the same address everywhere."""
        return {address: block.nbytes for address, block in zip(self.addresses, self.blocks, strict=True)}

    def check(self) -> None:
        """RuntimeError where the room is not what the tokens need."""
        if len(self) > len(self.blocks) * BLOCK:
            raise RuntimeError(f"a sequence of {len(self)} tokens has {len(self.blocks)} blocks of {BLOCK}")

    def shares_wrongly(self, other: BlockSequence) -> bool:
        """Whether a block that both have does not stand for the same tokens in both, or may still be written."""
        theirs = {address: i for i, address in enumerate(other.addresses)}
        for i, address in enumerate(self.addresses):
            j = theirs.get(address)
            if j is not None and (
                j != i or self.tokens[: (i + 1) * BLOCK] != other.tokens[: (i + 1) * BLOCK] or len(self) < (i + 1) * BLOCK
            ):
                return True
        return False
