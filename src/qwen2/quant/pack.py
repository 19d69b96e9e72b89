"""Weights into the blocks of a GGUF format: one function per format, the inverse of `formats.py`'s unpacking.

Q8_0 and the plain types are plain rounding, bit-equal to ggml's. The others search each group's scales (search.py), round them to
what the block stores, and round the weights with the stored scales. What is left out: which format a tensor should get, and
importances measured on text.
"""
# B blocks, W weights of a block, G groups of a block that share a scale

from __future__ import annotations

import torch
from torch import Tensor

from qwen2.quant.search import Grid, affine, integers, inverse, loudness, symmetric

AROUND = torch.arange(-9, 10) * -0.1  # trials of a symmetric scale, in steps of the grid
IQ4_NL_VALUES = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.int8)


def pack_f32(weights: Tensor) -> Tensor:
    return weights.float().contiguous().view(torch.uint8)


def pack_f16(weights: Tensor) -> Tensor:
    return weights.to(torch.float16).contiguous().view(torch.uint8)


def pack_bf16(weights: Tensor) -> Tensor:
    """Round to nearest even, NaN kept quiet with its upper bits, as ggml does (torch would write one NaN for all)."""
    bits = weights.float().contiguous().view(torch.int32)
    rounded = (bits.to(torch.int64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 64
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return torch.where(is_nan, quiet.to(torch.int64), rounded).to(torch.int16).view(torch.uint8)


def pack_q8_0(weights: Tensor) -> Tensor:
    """Scale = largest magnitude / 127 as fp16; the integers are rounded with the scale before that rounding, halves away from zero."""
    weights = weights.float()
    d = weights.abs().amax(1, keepdim=True) / 127
    q = weights * torch.where(d == 0, 0.0, 1 / d)
    magnitude = q.abs()
    whole = magnitude.floor()
    q = q.sign() * (whole + (2 * (magnitude - whole)).floor())
    return torch.cat([half(d[:, 0]), q.to(torch.int8).view(torch.uint8)], dim=1)


def half(numbers: Tensor) -> Tensor:
    """fp16 bytes of one number of each block: (B,) -> (B, 2)."""
    return numbers.to(torch.float16)[:, None].contiguous().view(torch.uint8)


def rounded(numbers: Tensor) -> Tensor:
    """What fp16 makes of the numbers."""
    return numbers.to(torch.float16).float()


def grouped(weights: Tensor, size: int) -> Tensor:
    """(B, W) -> (size, B * W / size) float32: groups along the last dimension, block by block."""
    return weights.float().view(-1, size).t().contiguous()


def quants(q: Tensor, blocks: int) -> Tensor:
    """(size, N) -> (B, W) uint8, weights in their order again."""
    return q.to(torch.uint8).t().reshape(blocks, -1)


def nibbles(q: Tensor) -> Tensor:
    """(B, 32) of four bits -> (B, 16): weights 0..15 in the low halves, 16..31 in the high ones."""
    return (q[:, :16] & 15) | (q[:, 16:] << 4)


def fifths(q: Tensor) -> Tensor:
    """(B, 32) of five bits -> (B, 4): the fifth bit of each weight, in order."""
    bits = (q >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(2).to(torch.uint8)


# ---- blocks of 32


def _symmetric(weights: Tensor, grid: Grid, trials: Tensor) -> tuple[Tensor, Tensor]:
    """The stored scale (B,) of blocks of one group each, and the grid's values (32, B)."""
    x = grouped(weights, 32)
    scale = symmetric(x, grid, trials, x.square())
    return scale, grid.nearest(x * inverse(rounded(scale)))


def pack_q4_0(weights: Tensor) -> Tensor:
    scale, q = _symmetric(weights, integers(-8, 7), AROUND)
    return torch.cat([half(scale), nibbles(quants(q + 8, len(weights)))], dim=1)


def pack_q5_0(weights: Tensor) -> Tensor:
    scale, q = _symmetric(weights, integers(-16, 15), AROUND)
    q = quants(q + 16, len(weights))
    return torch.cat([half(scale), fifths(q), nibbles(q)], dim=1)


# of each integer from -128 to 127, the place of the nearest of the sixteen values; and that value
PLACES = (torch.arange(-128, 128)[:, None] - IQ4_NL_VALUES.int()).abs().argmin(1)
NEAREST = IQ4_NL_VALUES.float()[PLACES]


def pack_iq4_nl(weights: Tensor) -> Tensor:
    scale, values = _symmetric(weights, Grid(-127, -128, 127, NEAREST), torch.arange(-7, 8))
    places = PLACES[values.int() + 128]
    return torch.cat([half(scale), nibbles(quants(places, len(weights)))], dim=1)


def _affine(weights: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Two stored fp16 numbers (B, 4) and the integers (B, 32)."""
    x = grouped(weights, 32)
    scale, minimum = affine(x, levels, torch.arange(-10, 11) * 0.1, loudness(x), below_zero=False)
    q = ((x - rounded(minimum)) * inverse(rounded(scale))).round_().clamp_(0, levels)
    return torch.cat([half(scale), half(minimum)], dim=1), quants(q, len(weights))


def pack_q4_1(weights: Tensor) -> Tensor:
    numbers, q = _affine(weights, 15)
    return torch.cat([numbers, nibbles(q)], dim=1)


def pack_q5_1(weights: Tensor) -> Tensor:
    numbers, q = _affine(weights, 31)
    return torch.cat([numbers, fifths(q), nibbles(q)], dim=1)


# ---- blocks of 256: the groups' scales are integers times an fp16 number


def _signed_scales(weights: Tensor, grid: Grid, lowest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of 16 with signed scales in lowest .. -lowest - 1: the fp16 factor (B,), the scales (B, 16), the integers (16, N)."""
    x = grouped(weights, 16)
    found = symmetric(x, grid, AROUND, x.square()).view(len(weights), 16)
    extreme = found.gather(1, found.abs().argmax(1, keepdim=True))[:, 0]
    factor = rounded(extreme / lowest)
    steps = (found * inverse(factor)[:, None]).round_().clamp_(lowest, -lowest - 1)  # (B, 16)
    scale = (factor[:, None] * steps).view(-1)
    return factor, steps, grid.nearest(x * inverse(scale))


def _both_scales(
    weights: Tensor, size: int, levels: int, steps: int, trials: Tensor, magnitude: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups of `size`: the two fp16 factors (B, 4 bytes), integer scales and minima up to `steps` (B, G), the integers (B, 256)."""
    x = grouped(weights, size)
    found = affine(x, levels, trials, x.abs() if magnitude else loudness(x), below_zero=True)
    scales, depths = found.scale.view(len(weights), -1), -found.minimum.view(len(weights), -1)  # (B, G)
    factors = [rounded(one.amax(1) / steps) for one in (scales, depths)]
    whole = [(one * inverse(factor)[:, None]).round_().clamp_(0, steps) for one, factor in zip((scales, depths), factors, strict=True)]
    scale, depth = ((factor[:, None] * one).view(-1) for one, factor in zip(whole, factors, strict=True))
    q = ((x + depth) * inverse(scale)).round_().clamp_(0, levels)
    numbers = torch.cat([half(factor) for factor in factors], dim=1)
    return numbers, whole[0].to(torch.uint8), whole[1].to(torch.uint8), quants(q, len(weights))


def _six_bit_pairs(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits -> (B, 12)."""
    first, second = (one[:, :4] | ((one[:, 4:] >> 4) << 6) for one in (scales, minima))
    return torch.cat([first, second, (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)], dim=1)


def _halves(q: Tensor) -> Tensor:
    """(B, 256) of four bits -> (B, 128): of each 64 weights the first 32 in the low halves of the bytes."""
    pairs = q.view(-1, 4, 2, 32) & 15
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(len(q), -1)


def _quarters(q: Tensor) -> Tensor:
    """(B, 256) of two bits -> (B, 64): of each 128 weights four times 32 share the bytes."""
    parts = (q.view(-1, 2, 4, 32) & 3) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return parts.sum(2).to(torch.uint8).view(len(q), -1)


def _eighths(bits: Tensor) -> Tensor:
    """(B, 256) of one bit -> (B, 32): bit j of byte l is weight 32 j + l."""
    parts = bits.view(-1, 8, 32) << torch.arange(8, dtype=torch.uint8)[:, None]
    return parts.sum(1).to(torch.uint8)


def pack_q2_k(weights: Tensor) -> Tensor:
    numbers, scales, minima, q = _both_scales(weights, 16, 3, 15, torch.arange(16) * 0.1 - 0.5, magnitude=True)
    return torch.cat([scales | (minima << 4), _quarters(q), numbers], dim=1)


def pack_q3_k(weights: Tensor) -> Tensor:
    factor, steps, q = _signed_scales(weights, integers(-4, 3), -32)
    whole, codes = quants(q + 4, len(weights)), (steps + 32).to(torch.uint8)
    low = (codes[:, :8] & 15) | ((codes[:, 8:] & 15) << 4)
    high = ((codes >> 4).view(-1, 4, 4) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]).sum(1).to(torch.uint8)
    return torch.cat([_eighths(whole >> 2), _quarters(whole), low, high, half(factor)], dim=1)


def pack_q4_k(weights: Tensor) -> Tensor:
    numbers, scales, minima, q = _both_scales(weights, 32, 15, 63, torch.arange(21) * 0.1 - 1, magnitude=False)
    return torch.cat([numbers, _six_bit_pairs(scales, minima), _halves(q)], dim=1)


def pack_q5_k(weights: Tensor) -> Tensor:
    numbers, scales, minima, q = _both_scales(weights, 32, 31, 63, torch.arange(16) * 0.1 - 0.5, magnitude=False)
    return torch.cat([numbers, _six_bit_pairs(scales, minima), _eighths(q >> 4), _halves(q)], dim=1)


def pack_q6_k(weights: Tensor) -> Tensor:
    factor, steps, q = _signed_scales(weights, integers(-32, 31), -128)
    whole = quants(q + 32, len(weights))
    low = whole.view(-1, 2, 2, 64) & 15  # of each 128 weights the first 64 in the low halves of the bytes
    low = (low[:, :, 0] | (low[:, :, 1] << 4)).reshape(len(whole), -1)
    return torch.cat([low, _quarters(whole >> 4), steps.to(torch.int8).view(torch.uint8), half(factor)], dim=1)
