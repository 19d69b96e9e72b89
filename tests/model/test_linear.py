"""Every routine gives torch's product, in value and, where a gradient is recorded, in gradient."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from qwen2.model.linear import FEW_ROWS, HAS_ONEDNN, NARROW, linear

CASES = list(product([0, 1, 2, FEW_ROWS, FEW_ROWS + 1, 40], [(12, 7), (13, 7), (8, NARROW + 8)], [True, False]))


def operands(rows: int, width: tuple[int, int], biased: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width[1], generator=generator)
    weight = torch.randn(width, generator=generator) / width[1] ** 0.5
    return x, weight, torch.randn(width[0], generator=generator) if biased else None


@pytest.mark.parametrize(("rows", "width", "biased"), CASES)
def test_values_equal_torchs(rows: int, width: tuple[int, int], biased: bool):
    x, weight, bias = operands(rows, width, biased)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            ours = linear(x, weight, bias)
        assert ours.shape == (rows, width[0])
        torch.testing.assert_close(ours, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "width", "biased"), CASES)
def test_gradients_equal_torchs(rows: int, width: tuple[int, int], biased: bool):
    x, weight, bias = operands(rows, width, biased)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    ours, theirs = (torch.autograd.grad(f(x, weight, bias).square().sum(), leaves) for f in (linear, F.linear))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_this_torch_has_the_fast_product():
    """Here, with the torch that the constraints name; elsewhere torch's own product is taken."""
    assert torch.backends.mkldnn.is_available() == HAS_ONEDNN


def test_leading_dimensions_and_other_types_stay():
    x, weight = torch.randn(2, 2, 8), torch.randn(16, 8)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            ours = linear(x.to(dtype), weight.to(dtype))
            assert (ours.shape, ours.dtype) == ((2, 2, 16), dtype)
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
        torch.testing.assert_close(linear(x.expand(3, 2, 2, 8), weight), F.linear(x.expand(3, 2, 2, 8), weight))
        torch.testing.assert_close(linear(x, weight.t().contiguous().t()), F.linear(x, weight))
