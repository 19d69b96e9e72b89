"""Qwen2's trap: large key biases, whose products overflow half precision, so that a model prints one letter without end.

llama.cpp computes these products in float32 for that reason. Every type that a CPU may compute in stays finite and close to the
exact result here, and float16 is refused there (tests/weights/test_model.py).
"""

from __future__ import annotations

import pytest
import torch

from qwen2.config import tiny
from qwen2.model import Qwen2, packed_attend
from tests.conftest import random_network

TOKENS = torch.randint(0, 512, (100,), generator=torch.Generator().manual_seed(5))


def with_large_biases() -> Qwen2:
    network = random_network(tiny())
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for layer in network.model.layers:
            bias = layer.self_attn.k_proj.bias
            bias.copy_(2000 * torch.randn(bias.shape, generator=generator))
            layer.self_attn.q_proj.bias.mul_(40)
    return network


def log_probabilities(network: Qwen2) -> torch.Tensor:
    with torch.inference_mode():
        hidden = network(TOKENS, packed_attend(network.config, torch.arange(len(TOKENS)), [len(TOKENS)]))
        return network.logits(hidden).double().log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_stay_finite_and_close(dtype: torch.dtype):
    exact = log_probabilities(with_large_biases().to(torch.float64))
    ours = log_probabilities(with_large_biases().to(dtype))
    assert ours.isfinite().all()
    divergence = (exact.exp() * (exact - ours)).sum(-1).mean()
    spread = -(exact.exp() * exact).sum(-1).mean()
    assert divergence < (1e-6 if dtype == torch.float32 else 0.1 * spread)


def test_the_biases_are_large_enough_for_the_trap():
    """The same products in half precision are infinite: the test above tests something."""
    attention = with_large_biases().model.layers[0].self_attn
    scores = attention.q_proj.bias.half().view(4, 16)[:2] @ attention.k_proj.bias.half().view(2, 16).t()
    assert not scores.isfinite().all()
