"""The forward pass of one step: a ragged batch through the network, with attention over the cache.

Rows of logits are computed only where they are asked for, and handed on in float32.
"""

# N tokens of the step, D hidden, R rows, V rows of the output head

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from qwen2.engine.attention import cached_attend
from qwen2.engine.blocks import BLOCK, CACHE_BITS, KernelMemory, TensorMemory
from qwen2.engine.kernel_attention import KernelAttend, key_factors
from qwen2.model.adapted import AdaptedRows
from qwen2.model.rope import Rope

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.engine.scheduler import Batch
    from qwen2.model import Qwen2
    from qwen2.model.adapted import ServedAdapter
    from qwen2.model.attention import Attend


class Runner:
    """The network, its rotation, and where they live."""

    def __init__(self, network: Qwen2, cache_bits: int = 16) -> None:
        self.network = network
        self.dtype, self.device = network.dtype, network.device
        self.rope = Rope(network.config, self.device)
        if cache_bits not in CACHE_BITS:
            raise ValueError(f"cache_bits {cache_bits!r}: must be 32, 16 or 8")
        if cache_bits == 8 and not network.packed:
            raise ValueError("cache_bits 8: only the kernels keep a cache of 8 bits, and this model is not computed with them here")
        config = network.config
        self.cache_bits = cache_bits
        self.lanes = network.lanes
        self.native = self.lanes > 0 and cache_bits < 32  # attention is the kernels' too; floats are torch's
        self.memory = KernelMemory(config, cache_bits) if self.native else TensorMemory(config, self.dtype, self.device)
        self.factors = key_factors(network) if cache_bits == 8 else None

    @property
    def token_bytes(self) -> int:
        """Memory of one token's keys and values, rounded up."""
        return -(-self.memory.block_bytes // BLOCK)

    def forward(self, batch: Batch) -> Tensor:
        """Read the batch's tokens: (N, D) as the last layer leaves them, not normed. The scheduler then advances the caches.

        Rows that are neither a span's last nor for a reader may be unfinished.
        """
        tokens = [token for span in batch for token in span.tokens]
        adapted = AdaptedRows.of([(span.answer.request.adapter, span.count) for span in batch])
        spans = [(span.answer.cache, span.count) for span in batch]
        return self.read(tokens, spans, wanted_rows(batch) if self.native else None, adapted)

    def read(self, ids: list[int], spans: list[Any], wanted: list[int] | None = None, adapted: AdaptedRows | None = None) -> Tensor:
        """The same for ids laid end to end and the sequences that they go on, each with its number of them; `wanted` rows or all."""
        tokens = torch.frombuffer(array("q", ids), dtype=torch.int64).to(self.device)  # (N,); torch.tensor looks at every number
        if self.native:
            attend: Attend = KernelAttend(self.network.config, self.rope, spans, self.factors, wanted, self.lanes)
        else:
            attend = cached_attend(self.rope, spans, self.dtype, self.device)
        x: Tensor = self.network(tokens, attend, normed=False, adapted=adapted)
        return x

    def hidden(self, x: Tensor) -> Tensor:
        """Rows of x (n, D) as the final norm leaves them: what logits and embeddings are made of."""
        normed: Tensor = self.network.model.norm(x)
        return normed

    def logits(self, x: Tensor, rows: list[int], adapters: Sequence[ServedAdapter | None] = ()) -> Tensor:
        """Logits of some rows of x (N, D) -> (R, V) float32; an adapter or None for each row where any has one."""
        wanted = x if len(rows) == len(x) and rows == list(range(len(x))) else x[rows]
        return self.network.next_logits(wanted, AdaptedRows.of_head([(adapter, 1) for adapter in adapters])).float()


def wanted_rows(batch: Batch) -> list[int] | None:
    """The rows of a step whose hidden states are used: those for a reader, the last where a token follows. None for all of them."""
    rows: list[int] = []
    start = 0
    for span in batch:
        used = span.answer.read_rows(span.count)
        first = span.count - 1 - len(span.guess) if span.is_last and not span.answer.request.only_read else span.count
        rows.extend(range(start + used.start, start + min(used.stop, first)))
        rows.extend(range(start + first, start + span.count))
        start += span.count
    return None if len(rows) == start else rows
