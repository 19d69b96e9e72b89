"""The split product equals torch's, in value and gradient, for every number of rows on both sides of its limit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwen2.model.linear import FEW_ROWS, linear


@pytest.mark.parametrize("rows", [0, 1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("width", [12, 13])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_equals_torch(rows: int, width: int, biased: bool):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 7, generator=generator, dtype=torch.float32).requires_grad_()
    weight = torch.randn(width, 7, generator=generator).requires_grad_()
    bias = torch.randn(width, generator=generator) if biased else None
    results = []
    for product in (linear, F.linear):
        out = product(x, weight, bias)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)


def test_leading_dimensions_stay():
    x, weight = torch.randn(2, 2, 8), torch.randn(16, 8)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
