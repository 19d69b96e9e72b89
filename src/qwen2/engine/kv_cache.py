"""Keys and values of every sequence, and the finished ones that later prompts may continue.

One growing pair of tensors per layer and sequence, in the compute dtype, of rotated keys: memory grows with use, a decode step
copies nothing. A finished sequence is kept for a while; a prompt that begins with its tokens takes over what they share, so a
conversation never reads its history again. The one used last is always kept: its memory was in use a moment ago. Beside it stay
up to `keep` in all, the least recently used going first, while all of them together hold at most `keep_bytes`.

Where the kernels run, a sequence is a list of blocks instead (blocks.py). Left out: preemption.
"""

# L layers, K kv heads, d head size, T tokens of one sequence, n tokens of one step

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Union

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.config import ModelConfig
    from qwen2.engine.blocks import BlockSequence

LEAST_GROWTH = 64  # tokens; beyond that a quarter of what there is, so that growing costs little on the whole


class SequenceCache:
    """One sequence: the tokens that were read and their keys and values, a (K, capacity, d) pair per layer."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens: list[int] = []  # those whose keys and values are stored in every layer
        self.capacity = 0
        empty = torch.empty(config.kv_heads, 0, config.head_dim, dtype=dtype, device=device)
        self.keys = [empty] * config.layers
        self.values = [empty] * config.layers

    def __len__(self) -> int:
        return len(self.tokens)

    def reserve(self, total: int) -> None:
        """Make room for `total` tokens; one layer at a time, so that no second copy of the whole ever exists."""
        if total <= self.capacity:
            return
        self.capacity = max(total, self.capacity + max(LEAST_GROWTH, self.capacity // 4))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._grown(old)

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_empty(old.shape[0], self.capacity, old.shape[2])
        new[:, : len(self)] = old[:, : len(self)]
        return new

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (n, K, d) behind what is there; keys and values of the whole sequence (K, T, d), as views."""
        start, end = len(self), len(self) + len(k)
        keys, values = self.keys[layer], self.values[layer]
        keys[:, start:end] = k.transpose(0, 1)
        values[:, start:end] = v.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def advance(self, tokens: Sequence[int]) -> None:
        """Count tokens in, once every layer has written them."""
        self.tokens.extend(tokens)
        assert len(self) <= self.capacity, f"{len(self)} tokens in room for {self.capacity}"

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.tokens[length:]

    def fork(self, length: int) -> SequenceCache:
        """A copy of the first `length` tokens that goes its own way."""
        copy = object.__new__(SequenceCache)
        copy.tokens = self.tokens[:length]
        copy.capacity = length
        copy.keys = [keys[:, :length].clone() for keys in self.keys]
        copy.values = [values[:, :length].clone() for values in self.values]
        return copy

    def held(self) -> dict[int, int]:
        """Memory by address, whether used yet or not."""
        return {tensor.data_ptr(): tensor.nbytes for tensor in (*self.keys, *self.values) if tensor.nbytes}

    def check(self) -> None:
        """RuntimeError where the room is not what the tokens need."""
        rooms = {tensor.shape[1] for tensor in (*self.keys, *self.values)}
        if rooms != {self.capacity} or len(self) > self.capacity:
            raise RuntimeError(f"a sequence of {len(self)} tokens has room for {self.capacity}, its tensors for {sorted(rooms)}")

    def shares_wrongly(self, other: SequenceCache) -> bool:
        """Whether memory belongs to both."""
        return not self.held().keys().isdisjoint(other.held())


AnySequence = Union[SequenceCache, "BlockSequence"]


class KVCache:
    """All sequences of one engine; `new` makes an empty one."""

    def __init__(self, new: Callable[[], AnySequence], keep_bytes: int, keep: int = 4) -> None:
        self.new = new
        self.keep, self.keep_bytes = keep, keep_bytes
        self.live: list[AnySequence] = []
        self.kept: list[AnySequence] = []  # finished, least recently used first

    def open(self, prompt: Sequence[int], reuse: bool = True) -> AnySequence:
        """A cache for a prompt, holding the longest beginning that a kept sequence shares with it.

        The prompt's last token is always read anew, because its logits are wanted. A kept sequence that the prompt continues
        is taken over; one that goes another way is copied and stays.
        """
        kept, shared = self._best(prompt) if reuse else (None, 0)
        if kept is None:
            cache = self.new()
        elif shared == len(kept):
            self.kept.remove(kept)
            cache = kept
        else:
            cache = kept.fork(shared)
            self.kept.remove(kept)
            self.kept.append(kept)  # used just now
        cache.reserve(len(prompt) + LEAST_GROWTH)
        self.live.append(cache)
        return cache

    def _best(self, prompt: Sequence[int]) -> tuple[AnySequence | None, int]:
        best, longest = None, 0
        for kept in self.kept:
            shared = min(common_prefix(kept.tokens, prompt), len(prompt) - 1)
            if shared >= longest and shared > 0:  # of equals the one used last
                best, longest = kept, shared
        return best, longest

    def fork(self, cache: AnySequence) -> AnySequence:
        """A second live sequence with the same beginning."""
        copy = cache.fork(len(cache))
        self.live.append(copy)
        return copy

    def close(self, cache: AnySequence, keep: bool = True) -> None:
        """A sequence is done: keep it for prompts to come, or free it."""
        self.live.remove(cache)
        if not keep or len(cache) == 0:
            return
        kept = [old for old in self.kept if common_prefix(old.tokens, cache.tokens) < len(old)]  # not those it contains
        kept.append(cache)
        while self._too_much(kept):
            kept.pop(0)
        self.kept = kept

    def _too_much(self, kept: Sequence[AnySequence]) -> bool:
        return len(kept) > 1 and (len(kept) > self.keep or memory(kept) > self.keep_bytes)

    def clear(self) -> None:
        """Free every kept sequence."""
        self.kept.clear()

    @property
    def nbytes(self) -> int:
        """Memory of live and kept sequences."""
        return memory((*self.live, *self.kept))

    def check(self, in_use: Iterable[AnySequence]) -> None:
        """Every sequence is live and owned once, or kept, never both, and holds what it says. Runs when the engine falls idle."""
        owned = [id(cache) for cache in in_use]
        if sorted(owned) != sorted(map(id, self.live)):
            raise RuntimeError(f"{len(self.live)} sequences are live, requests hold {len(owned)}")
        if {id(cache) for cache in self.kept} & set(owned):
            raise RuntimeError("a kept sequence is in use")
        if self._too_much(self.kept):
            held = memory(self.kept)
            raise RuntimeError(f"{len(self.kept)} sequences of {held} bytes are kept, {self.keep} of {self.keep_bytes} bytes are allowed")
        everyone = [*self.live, *self.kept]
        for index, cache in enumerate(everyone):
            cache.check()
            if any(cache.shares_wrongly(other) for other in everyone[:index]):  # type: ignore[arg-type]
                raise RuntimeError("two sequences share memory")


def memory(sequences: Iterable[AnySequence]) -> int:
    """Bytes that these hold together, what several share counted once."""
    return sum({address: size for sequence in sequences for address, size in sequence.held().items()}.values())


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory of one token's keys and values."""
    return 2 * config.layers * config.kv_heads * config.head_dim * dtype.itemsize


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:  # compared at C speed; the common case of a conversation going on
        return length
    return next(i for i in range(length) if a[i] != b[i])
