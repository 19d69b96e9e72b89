"""Qwen2's trap through the kernels: keys with a few biases of tens to hundreds, in a cache of 16 and of 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen2 import LLM, kernels
from qwen2.config import tiny
from qwen2.engine.kernel_attention import key_factors
from qwen2.model import packed_attend
from qwen2.weights.export import to_hf_folder
from tests.conftest import tiny_model

pytestmark = pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")
CONFIG = tiny(hidden=256, heads=4, kv_heads=2, ffn=512)  # a head size of 64
TOKENS = torch.randint(0, 500, (300,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the key biases of Qwen2-7B in small: most are of the size of the rest, one dimension in sixteen is fifty times larger."""
    model = tiny_model(CONFIG)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for layer in model.network.model.layers:
            bias = layer.self_attn.k_proj.bias
            bias.copy_(torch.randn(bias.shape, generator=generator))
            bias[::16] *= 50
    path = tmp_path_factory.mktemp("biased") / "model"
    to_hf_folder(model, path)
    return path


def exact(folder: Path) -> torch.Tensor:
    network = LLM(folder, isa="none", dtype="float32").model.network.double()
    try:
        with torch.inference_mode():
            attend = packed_attend(network.config, torch.arange(len(TOKENS)), [len(TOKENS)])
            return network.logits(network(torch.tensor(TOKENS), attend)).log_softmax(-1)
    finally:
        kernels.select_isa(None)


def divergence(truth: torch.Tensor, logits: torch.Tensor) -> float:
    return float((truth.exp() * (truth - logits.double().log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize(("cache_bits", "most"), [(16, 1e-4), (8, 0.04)])
def test_answers_stay_close_in_every_cache(folder: Path, cache_bits: int, most: float) -> None:
    truth = exact(folder)
    llm = LLM(folder, cache_bits=cache_bits)
    logits = llm.logits(TOKENS)
    assert logits.isfinite().all()
    found = divergence(truth, logits)
    assert found < most
    if cache_bits == 8:  # and that is the factors' doing
        assert llm.engine.runner.factors is not None
        llm.engine.runner.factors = torch.ones_like(llm.engine.runner.factors)
        assert divergence(truth, llm.logits(TOKENS)) > 5 * found


def test_factors_are_what_a_pair_of_dimensions_is_expected_to_be(folder: Path) -> None:
    llm = LLM(folder, cache_bits=8)
    network, half = llm.model.network, CONFIG.head_dim // 2
    factors = key_factors(network)
    assert factors.shape == (CONFIG.layers, CONFIG.kv_heads, half)
    plain = tiny_model(CONFIG).network
    for index, layer in enumerate(plain.model.layers):
        bias = network.model.layers[index].self_attn.k_proj.bias
        weight = layer.self_attn.k_proj.weight * layer.input_layernorm.weight
        for head in range(CONFIG.kv_heads):
            for pair in (0, 3, 16, half - 1):
                sizes = []
                for dim in (pair, pair + half):
                    row = head * CONFIG.head_dim + dim
                    sizes.append(abs(float(bias[row])) + 2 * float(weight[row].detach().norm()))
                assert float(factors[index, head, pair]) == pytest.approx((sizes[0] ** 2 + sizes[1] ** 2) ** 0.5, rel=1e-5)
