"""The searching packers: against a slow search in fp64, against llama.cpp's recorded errors, and on every kind of odd weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2 import kernels
from qwen2.quant import FORMATS, dequantize, format_id, quantize
from qwen2.quant.pack import AROUND, NEAREST
from qwen2.quant.search import Grid, affine, integers, symmetric
from tests.golden.quantizer import error, matrix

SEARCHED = [form.name for form in FORMATS.values() if form.block > 1 and form.name != "Q8_0"]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "quantizer.json").read_text())["errors"]
GRIDS = {"five bits": integers(-16, 15), "three bits": integers(-4, 3), "table": Grid(-127, -128, 127, NEAREST)}
RANGE = torch.arange(21) * 0.1 - 1
Group = list[float]


@pytest.fixture(params=["native", "torch"])
def searcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The search of the kernels, then that of torch."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "isa", lambda: None)
    elif kernels.isa() is None:
        pytest.skip("no kernels for this processor")
    return str(request.param)


def rounded(value: float, grid: Grid) -> float:
    """Half to even, within the grid, through its table; the value as the float32 that is rounded."""
    whole = min(max(round(float(np.float32(value))), int(grid.low)), int(grid.high))
    return float(whole if grid.table is None else grid.table[whole + 128])


def loss(x: Group, w: Group, q: Group, scale: float, minimum: float = 0.0) -> float:
    return sum(b * (scale * c + minimum - a) ** 2 for a, b, c in zip(x, w, q, strict=True))


def slow_symmetric(x: Group, w: Group, grid: Grid) -> float:
    """The smallest error that a trial's least-squares scale leaves."""
    largest, best = max(x, key=abs), sum(b * a * a for a, b in zip(x, w, strict=True))
    for trial in AROUND.tolist():
        q = [rounded(a * (grid.first + trial) / largest, grid) for a in x] if largest else [0.0] * len(x)
        norm = sum(b * c * c for b, c in zip(w, q, strict=True))
        if norm > 0:
            best = min(best, loss(x, w, q, sum(b * a * c for a, b, c in zip(x, w, q, strict=True)) / norm))
    return best


def slow_affine(x: Group, w: Group, levels: int, below_zero: bool) -> float:
    low, high = min(x), max(x)
    low, best = min(low, 0.0) if below_zero else low, math.inf
    for trial in RANGE.tolist():
        q = [min(max(round((a - low) * (levels + trial) / (high - low)), 0), levels) for a in x]
        design = np.sqrt(np.array(w))[:, None] * np.stack([np.array(q, dtype=float), np.ones(len(x))], axis=1)
        target = np.sqrt(np.array(w)) * np.array(x)
        (scale, minimum), *_ = np.linalg.lstsq(design, target, rcond=None)
        if below_zero and minimum > 0:
            scale, minimum = np.linalg.lstsq(design[:, :1], target, rcond=None)[0][0], 0.0
        if scale > 0:
            best = min(best, loss(x, w, q, scale, minimum))
    return best


def groups(width: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(width, count) of several shapes, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(width, count, generator=generator)
    x[:, 1] *= 1e-6
    x[:, 2] = x[:, 2].abs() + 3  # all of one sign, far from zero
    x[0, 3] = 40  # an outlier
    x[:, 4] = torch.linspace(-1, 0.9, width)
    x[:, 5] *= torch.rand(width, generator=generator) > 0.9  # mostly zeros
    return x, x.abs() + 0.1 * x.abs().mean(0)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("name", GRIDS)
def test_no_trial_is_better_than_the_symmetric_scale_found(name: str, width: int, searcher: str) -> None:
    grid, (x, w) = GRIDS[name], groups(width, 37, 1)
    scales = symmetric(x, grid, AROUND, w)
    for i in range(x.shape[1]):
        one, weights = x[:, i].tolist(), w[:, i].tolist()
        q = [rounded(a / float(scales[i]), grid) for a in one]
        slack = 1.0001 if grid.table is None else 1.05  # a table is entered with whole numbers, between two of which its step may lie
        assert loss(one, weights, q, float(scales[i])) <= slack * slow_symmetric(one, weights, grid) + 1e-30, i


@pytest.mark.parametrize("below_zero", [True, False])
@pytest.mark.parametrize(("width", "levels"), [(16, 3), (32, 15), (32, 31)])
def test_no_trial_is_better_than_the_line_found(width: int, levels: int, below_zero: bool, searcher: str) -> None:
    x, w = groups(width, 37, 2)
    found = affine(x, levels, RANGE, w, below_zero=below_zero)
    for i in range(x.shape[1]):
        one, weights, scale, minimum = x[:, i].tolist(), w[:, i].tolist(), float(found.scale[i]), float(found.minimum[i])
        assert minimum <= 0 or not below_zero
        q = [float(min(max(round((a - minimum) / scale), 0), levels)) for a in one]
        spread = sum(b * a * a for a, b in zip(one, weights, strict=True))  # the closed form's own rounding is a share of it
        assert loss(one, weights, q, scale, minimum) <= 1.001 * slow_affine(one, weights, levels, below_zero) + 1e-6 * spread, i


@pytest.mark.parametrize("name", SEARCHED)
def test_errors_are_those_of_llama_cpp_or_smaller(name: str, searcher: str) -> None:
    weights = matrix()
    assert error(quantize(torch.from_numpy(weights), format_id(name)), format_id(name), weights) < 1.02 * GOLDEN[name]


@given(data=st.data())
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", SEARCHED)
def test_weights_that_a_format_holds_come_back(name: str, data: st.DataObject) -> None:
    """Whatever was unpacked from a file's blocks loses next to nothing when it is packed again."""
    form, kind = FORMATS[format_id(name)], format_id(name)
    seed = data.draw(st.integers(0, 2**32 - 1))
    weights = torch.randn(4, form.block, generator=torch.Generator().manual_seed(seed))
    once = dequantize(quantize(weights, kind), kind, (4, form.block))
    lost, again = (once - weights).square().mean(), (dequantize(quantize(once, kind), kind, (4, form.block)) - once).square().mean()
    assert again < 0.3 * lost


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1.0, 1e3])
@pytest.mark.parametrize("name", SEARCHED)
def test_any_size_of_weights_is_held(name: str, scale: float, searcher: str) -> None:
    """Relative errors stay as they are down to where fp16 scales end; nothing becomes NaN or infinite."""
    kind, weights = format_id(name), torch.randn(8, 256, generator=torch.Generator().manual_seed(5))
    weights[1], weights[2, 7], weights[3] = 0, 30, 1
    back = dequantize(quantize(weights * scale, kind), kind, (8, 256))
    assert bool(back.isfinite().all())
    assert not back[1].any()
    if scale >= 1e-3:
        plain = dequantize(quantize(weights, kind), kind, (8, 256)) - weights
        assert float((back / scale - weights).square().mean()) < 1.1 * float(plain.square().mean())
    elif scale == 0:
        assert not back.any()
    else:
        assert float(back.abs().max()) <= 2 * float(weights.abs().max()) * scale


@pytest.mark.parametrize("name", SEARCHED)
def test_constant_and_sparse_groups_come_back(name: str, searcher: str) -> None:
    """Groups whose least-squares line is not determined: constants of either sign, one weight among zeros."""
    kind, weights = format_id(name), torch.zeros(6, 256)
    weights[0], weights[1] = 0.02, -0.02
    weights[2, ::16], weights[3, ::16] = 0.03, -0.03
    weights[4, 5] = -1.0
    weights[5, ::32], weights[5, 1::32] = 0.5, -0.25  # steps that two bits have
    back = dequantize(quantize(weights, kind), kind, (6, 256))
    for row in range(6):
        lost = (back[row] - weights[row]).square().sum() / weights[row].square().sum()
        assert lost < 0.03, (row, float(lost))


@pytest.mark.parametrize("name", SEARCHED)
def test_sparse_matrices_lose_no_more_than_llama_cpp_loses(name: str, searcher: str) -> None:
    """Nine of ten weights zero; llama.cpp's Q2_K leaves a root mean square error of 0.44 of the weights' own, others less."""
    generator = torch.Generator().manual_seed(8)
    weights = torch.randn(64, 256, generator=generator) * (torch.rand(64, 256, generator=generator) < 0.1)
    back = dequantize(quantize(weights, format_id(name)), format_id(name), (64, 256))
    assert float((back - weights).norm() / weights.norm()) < 0.46


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(name: str, bad: float) -> None:
    weights = torch.randn(2, 256)
    weights[1, 7] = bad
    with pytest.raises(ValueError, match=r"holds no NaN and no infinity"):
        quantize(weights, format_id(name))


def test_pieces_are_packed_as_wholes(searcher: str) -> None:
    weights = torch.randn(2100, 256, generator=torch.Generator().manual_seed(6))  # more than a piece, the last one short
    kind = format_id("Q4_K")
    assert np.array_equal(quantize(weights, kind), np.concatenate([quantize(weights[:5], kind), quantize(weights[5:], kind)]))
