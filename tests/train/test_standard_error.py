"""Standard errors: what resampling the examples gives."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from qwen2.train import standard_error


def test_of_a_share() -> None:
    assert standard_error.of_share(0.7, 100) == pytest.approx(sqrt(0.21 / 100))
    assert standard_error.of_share(1.0, 7) == 0
    with pytest.raises(ValueError, match="no examples"):
        standard_error.of_share(0.5, 0)


def test_of_a_ratio_is_the_spread_of_resampled_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 60, (400,), generator=generator).double()
    sums = counts * (2 + 0.5 * torch.randn(400, generator=generator).double()) + 20 / counts  # short ones are harder
    drawn = torch.randint(0, 400, (4000, 400), generator=generator)
    spread = float((sums[drawn].sum(1) / counts[drawn].sum(1)).std())
    assert standard_error.of_ratio(sums, counts) == pytest.approx(spread, rel=0.05)
    equal = torch.full((400,), 3.0)  # examples of equal length: the error of a mean
    assert standard_error.of_ratio(sums, equal) == pytest.approx(float(sums.std()) / sqrt(400) / 3)
    assert standard_error.of_ratio(sums[:1], counts[:1]) is None
    assert standard_error.of_ratio(sums, torch.zeros(400)) is None


def test_names() -> None:
    values = {"held-out loss": 1.5, "held-out loss standard error": 0.25, "accuracy": 0.5, "accuracy_standard_error": 0.125, "margin": 2.0}
    assert [standard_error.named(name) for name in ("held-out loss", "accuracy")] == [*values][1:4:2]
    assert [name for name in values if standard_error.is_error(name)] == [*values][1:4:2]
    assert list(standard_error.said(values)) == ["held-out loss 1.5000 +- 0.2500", "accuracy 0.5000 +- 0.1250", "margin 2.0000"]
