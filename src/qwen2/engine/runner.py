"""The forward pass of one step: a ragged batch through the network, with attention over the cache.

Rows of logits are computed only where they are asked for, and handed on in float32.
"""

# N tokens of the step, D hidden, R rows, V rows of the output head

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwen2.engine.attention import cached_attend
from qwen2.model.rope import Rope

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.engine.scheduler import Batch
    from qwen2.model import Qwen2


class Runner:
    """The network, its rotation, and where they live."""

    def __init__(self, network: Qwen2) -> None:
        self.network = network
        self.dtype, self.device = network.dtype, network.device
        self.rope = Rope(network.config, self.device)

    def forward(self, batch: Batch) -> Tensor:
        """Read the batch's tokens, (N, D); their keys and values are in the caches, which the scheduler then advances."""
        tokens = torch.tensor([token for span in batch for token in span.tokens], device=self.device)  # (N,)
        attend = cached_attend(self.rope, [(span.answer.cache, span.count) for span in batch], self.dtype, self.device)
        hidden: Tensor = self.network(tokens, attend)
        return hidden

    def logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """Logits of some rows of hidden (N, D) -> (R, V) float32."""
        wanted = hidden if len(rows) == len(hidden) and rows == list(range(len(hidden))) else hidden[rows]
        return self.network.logits(wanted).float()
