"""Rotary embedding: YaRN's vectors, the rotation as a complex product, and transformers' tables."""

from __future__ import annotations

import math

import pytest
import torch

from qwen2.config import ModelConfig, RopeScaling, tiny
from qwen2.model.rope import Rope, inv_frequencies, rotate

YARN = RopeScaling(factor=4.0, original_context=32768)


def with_head_dim(d: int, **changes: object) -> ModelConfig:
    return tiny(hidden=4 * d, heads=4, **changes)


@pytest.mark.parametrize(
    ("d", "values"),
    [
        (128, {0: 1.0, 23: 6.978306e-03, 31: 8.029597e-04, 40: 4.445699e-05, 63: 3.102344e-07}),
        (64, {11: 8.659643e-03, 15: 1.026618e-03, 20: 4.445699e-05, 31: 3.849816e-07}),
    ],
)
def test_yarn_vectors(d: int, values: dict[int, float]):
    """Worked out from the paper's formulas in double precision, theta 1e6, 32,768 stretched by 4."""
    frequencies, scale = inv_frequencies(with_head_dim(d, rope_scaling=YARN))
    assert scale == pytest.approx(1.138629436)
    for dimension, expected in values.items():
        assert frequencies[dimension].item() == pytest.approx(expected, rel=1e-6)


def test_yarn_formula_by_hand():
    """Dimension by dimension, with the ramp written out."""
    d, theta, factor, original = 64, 1e4, 2.0, 256
    frequencies, scale = inv_frequencies(with_head_dim(d, rope_theta=theta, rope_scaling=RopeScaling(factor, original)))
    low = math.floor(d * math.log(original / (32 * 2 * math.pi)) / (2 * math.log(theta)))
    high = math.ceil(d * math.log(original / (1 * 2 * math.pi)) / (2 * math.log(theta)))
    for i in range(d // 2):
        plain = theta ** (-2 * i / d)
        ramp = min(max((i - low) / (high - low), 0), 1)
        assert frequencies[i].item() == pytest.approx(plain / factor * ramp + plain * (1 - ramp), rel=1e-5)
    assert scale == pytest.approx(0.1 * math.log(2) + 1)


def test_settings_of_yarn_are_used():
    base = inv_frequencies(with_head_dim(64, rope_scaling=YARN))
    for changed in (RopeScaling(4.0, 32768, beta_fast=64), RopeScaling(4.0, 32768, beta_slow=4), RopeScaling(4.0, 32768, truncate=False)):
        assert not torch.equal(inv_frequencies(with_head_dim(64, rope_scaling=changed))[0], base[0])
    assert inv_frequencies(with_head_dim(64, rope_scaling=RopeScaling(4.0, 32768, attention_factor=1.5)))[1] == 1.5


@pytest.mark.parametrize("scaling", [None, YARN])
def test_tables_equal_transformers_far_out(scaling: RopeScaling | None):
    from transformers import AutoConfig
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    config = with_head_dim(64, context=131072, rope_scaling=scaling)
    positions = torch.tensor([0, 1, 511, 32767, 100_000, 131_071])
    cos, sin = Rope(config).tables(positions, torch.float32)
    theirs = Qwen2RotaryEmbedding(AutoConfig.for_model(**config.to_hf()))(torch.empty(1), positions[None])
    for ours, reference in zip((cos, sin), theirs, strict=True):
        torch.testing.assert_close(ours[:, 0], reference[0, :, :32], rtol=0, atol=1e-6)


def test_rotation_is_a_complex_product():
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    rope = Rope(tiny(hidden=32, heads=4))
    positions = torch.tensor([0, 1, 7, 100, 3])
    turned = rotate(x, *rope.tables(positions, torch.float32))
    angles = positions[:, None, None] * rope.inv_freq
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1))
