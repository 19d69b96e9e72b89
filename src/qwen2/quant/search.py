"""The search for the scales of groups of weights: of many scales near the obvious one, that with the smallest squared error.

A group's weights x become small integers q times a scale s, or s q + m with a minimum m. The integers follow from a trial scale by
rounding; the best s (and m) for those integers is a least-squares solution in closed form; the trial whose solution leaves the
smallest weighted error wins. Large weights count more, which costs perplexity less than equal weights do. These are the searches
that llama.cpp's files are made with, so that files of one format are of one quality.

Groups lie along the last dimension, (W, N): every step is a whole-vector operation over N groups.
With a native library the trials are made there (kernels/search.h), many times faster; the sums then differ in their last bits.
What is left out: importances measured on text (they come with `compress/`), and the formats' bytes (pack.py).
"""
# W weights of a group, N groups

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen2 import kernels
from qwen2.kernels.calls import SearchStruct, run_search

WIDEST = 32  # weights of a group that the kernels search
LEAST_GAIN = 1e-6  # of a group's square by which a trial must be better: less is rounding


class Grid(NamedTuple):
    """The whole numbers low .. high, or for each of -128 .. 127 its number in `table`; `first` is the one farthest from zero."""

    first: float
    low: float
    high: float
    table: Tensor | None = None  # (256,)

    def nearest(self, x: Tensor) -> Tensor:
        """Round x in place."""
        x.round_().clamp_(self.low, self.high)
        return x if self.table is None else x.copy_(self.table[x.int() + 128])


def integers(low: int, high: int) -> Grid:
    """low .. high, low farthest from zero."""
    return Grid(low, low, high)


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0 or so small that its inverse overflows."""
    found = 1 / x
    return torch.where(found.isfinite(), found, 0.0)


def symmetric(x: Tensor, grid: Grid, trials: Tensor, weights: Tensor) -> Tensor:
    """Scales (N,) for x (W, N) = scale * q: trial t puts the largest weight on `grid.first` + t."""
    if kernels.isa() is not None and len(x) <= WIDEST:
        return _native(x, grid, trials, weights)[0]
    largest = x.gather(0, x.abs().argmax(0, keepdim=True))[0]  # (N,) with its sign
    unit, weighted = inverse(largest), weights * x
    best, scales = torch.full_like(largest, -1.0), torch.zeros_like(largest)
    q, product = torch.empty_like(x), torch.empty_like(x)
    for trial in trials.tolist():
        torch.mul(x, unit * (grid.first + trial), out=q)
        grid.nearest(q)
        along = torch.mul(weighted, q, out=product).sum(0)
        norm = torch.mul(weights, q, out=product).mul_(q).sum(0)
        scale = along * inverse(norm)
        gain = along * scale  # what the error falls by: the sum of w x^2 stays the same
        better = gain > best
        best, scales = torch.where(better, gain, best), torch.where(better, scale, scales)
    return scales


class Affine(NamedTuple):
    scale: Tensor  # (N,)
    minimum: Tensor  # (N,)


def affine(x: Tensor, levels: int, trials: Tensor, weights: Tensor, *, below_zero: bool) -> Affine:
    """x (W, N) = scale * q + minimum with q in 0 .. levels: trial t spreads the range over `levels` + t; `below_zero`: minimum <= 0."""
    if kernels.isa() is not None and len(x) <= WIDEST:
        return Affine(*_native(x, Grid(0, 0, levels), trials, weights, below_zero=below_zero))
    low, high = x.amin(0), x.amax(0)
    if below_zero:
        low = low.clamp(max=0.0)
    unit, shifted = inverse(high - low), x - low
    w, wx = weights.sum(0), (weighted := weights * x).sum(0)
    wxx = (weighted * x).sum(0)
    q, product = torch.empty_like(x), torch.empty_like(x)
    scales, minima = (high - low) / levels, low.clone()  # the plain range, which stays where no trial has a solution
    torch.mul(shifted, unit * levels, out=q).round_().clamp_(0, levels)
    best = q.mul_(scales).add_(low).sub_(x).square_().mul_(weights).sum(0)
    least = wxx * LEAST_GAIN
    for trial in trials.tolist():
        torch.mul(shifted, unit * (levels + trial), out=q).round_().clamp_(0, levels)
        wxq = torch.mul(weighted, q, out=product).sum(0)
        wq = torch.mul(weights, q, out=product).sum(0)
        wqq = product.mul_(q).sum(0)
        divisor = inverse(w * wqq - wq * wq)
        scale, minimum = (w * wxq - wx * wq) * divisor, (wqq * wx - wq * wxq) * divisor
        if below_zero:
            over = minimum > 0
            scale, minimum = torch.where(over, wxq * inverse(wqq), scale), torch.where(over, 0.0, minimum)
        error = wxx + scale * (scale * wqq - 2 * wxq) + minimum * (minimum * w + 2 * (scale * wq - wx))
        better = (error < best - least) & (scale > 0)
        best = torch.where(better, error, best)
        scales, minima = torch.where(better, scale, scales), torch.where(better, minimum, minima)
    return Affine(scales, minima)


def _native(x: Tensor, grid: Grid, trials: Tensor, weights: Tensor, *, below_zero: bool | None = None) -> tuple[Tensor, Tensor]:
    """Scales and minima (N,) by the kernels; `below_zero` None asks for scales alone."""
    scale, minimum = torch.empty(2, x.shape[1])
    x, weights, trials = x.contiguous(), weights.contiguous(), trials.float()
    run_search(
        SearchStruct(
            x=x.data_ptr(),
            weights=weights.data_ptr(),
            trials=trials.data_ptr(),
            table=None if grid.table is None else grid.table.data_ptr(),
            scale=scale.data_ptr(),
            minimum=None if below_zero is None else minimum.data_ptr(),
            groups=x.shape[1],
            first=grid.first,
            low=grid.low,
            high=grid.high,
            width=x.shape[0],
            trial_count=len(trials),
            below_zero=bool(below_zero),
        )
    )
    return scale, minimum


def loudness(x: Tensor) -> Tensor:
    """Weights of a group's errors between equal ones and |x|: the group's root mean square plus |x|."""
    total = torch.zeros_like(x[0])
    for row in x.square():  # in this order, and numpy's root, which is exact to the last bit: the same files on every processor
        total += row
    return torch.from_numpy(np.sqrt((total / len(x)).numpy())) + x.abs()
