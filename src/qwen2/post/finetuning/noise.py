"""NEFTune (arXiv 2310.05914): noise on the embeddings while a model is fine-tuned, which keeps it from learning few examples by heart.

To each number of an example of L tokens and width D something from -alpha to alpha, uniformly, over sqrt(L D) is added (section 3). It is
drawn by torch's generator, whose state a checkpoint keeps, and only where a gradient is recorded: what is evaluated has none.

    loss = with_noise(loss, alpha=5.0)
"""

# N tokens of a batch, D hidden

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qwen2.data.batches import Batch
    from qwen2.model import Qwen2

Loss = Callable[["Qwen2", "Batch"], Any]


def with_noise(loss: Loss, alpha: float) -> Loss:
    """The same loss over noisy embeddings."""

    def noisy(network: Qwen2, batch: Batch) -> Any:
        sizes = torch.tensor(batch.lengths, device=batch.tokens.device)
        bounds = alpha / (sizes * network.config.hidden).sqrt().repeat_interleave(sizes)  # (N,)

        def add(_: Any, __: Any, embedded: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return embedded
            return embedded + (torch.rand_like(embedded) * 2 - 1) * bounds[:, None].to(embedded.dtype)

        handle = network.model.embed_tokens.register_forward_hook(add)
        try:
            return loss(network, batch)
        finally:
            handle.remove()

    return noisy
