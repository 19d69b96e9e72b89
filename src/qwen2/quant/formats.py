"""The block formats of GGUF files as one table: how many weights a block holds, in how many bytes, and how to unpack it.

A quantized tensor is a row of blocks; a block is a fixed number of bytes (fp16 scales, small integers) that stands for a fixed
number of weights. `unpack` turns blocks (B, bytes) of uint8 into weights (B, block) of float32, bit-equal to
`gguf.quants.dequantize`: the same products and sums of float32 numbers in the same order, so nothing differs but NaN payloads.

What is left out, and why:
1) packing, which is in pack.py;
2) the importance-matrix formats (IQ1, IQ2, IQ3, IQ4_XS) and the ternary ones: no Qwen2 release uses them;
3) big-endian machines: eight small integers are moved at once as one int64.

    from qwen2.quant import FORMATS, dequantize
"""
# B blocks, W weights of a block, G groups of a block that share a scale

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen2.quant import pack
from qwen2.quant.layout import LAYOUTS
from qwen2.quant.pack import IQ4_NL_VALUES

Unpack = Callable[[Tensor, Tensor], None]
Pack = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """One ggml type: `block` weights in `bytes` bytes; `unpack(blocks, out)` fills out (B, block), `pack(weights)` gives blocks."""

    name: str
    block: int
    bytes: int
    unpack: Unpack
    pack: Pack

    def size(self, weights: int) -> int:
        """Bytes of that many weights, which must be whole blocks."""
        assert weights % self.block == 0, f"{weights} weights are not whole blocks of {self.block}"
        return weights // self.block * self.bytes


def every_byte(value: int) -> int:
    """The int64 with this value (below 128) in each of its eight bytes."""
    return int.from_bytes(bytes([value] * 8), "little")


def scale(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at this byte of each block: (B, bytes) -> (B, 1) float32."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def lanes(blocks: Tensor, start: int, stop: int) -> Tensor:
    """These bytes of each block, eight at a time: (B, bytes) uint8 -> (B, (stop - start) / 8) int64."""
    return blocks[:, start:stop].clone(memory_format=torch.contiguous_format).view(torch.int64)  # a copy: int64 must lie aligned


def fields(x: Tensor, bits: int, shifts: tuple[int, ...], dim: int) -> Tensor:
    """For each shift, the bits of every byte from there on: int64 lanes, stacked along a new dimension."""
    mask = every_byte((1 << bits) - 1)  # also clears what a shift carries over from the byte above, and the sign bits
    return torch.stack([(x >> s if s else x).bitwise_and(mask) for s in shifts], dim=dim)


def spread(out: Tensor, q: Tensor, factor: Tensor, minus: Tensor | None = None) -> None:
    """out = factor * q - minus, group by group: q int64 lanes of int8, factor and minus (B, G)."""
    grouped = out.view(len(out), factor.shape[1], -1)  # (B, G, W / G)
    grouped.copy_(q.reshape(len(out), -1).view(torch.int8).view(grouped.shape))
    grouped.mul_(factor.unsqueeze(2))
    if minus is not None:
        grouped.sub_(minus.unsqueeze(2))


def lowered(q: Tensor, zero: int) -> Tensor:
    """Subtract the zero point from each byte of the lanes."""
    q = q.contiguous()
    q.view(torch.int8).sub_(zero)
    return q


# ---- plain numbers


def unpack_f32(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.float32))


def unpack_f16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.float16))


def unpack_bf16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.bfloat16))


# ---- blocks of 32


def unpack_q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(scale(blocks, 0))


def nibbles(blocks: Tensor, start: int) -> Tensor:
    """16 bytes of each block: low halves are weights 0..15, high halves 16..31. -> (B, 4) lanes."""
    return fields(lanes(blocks, start, start + 16), 4, (0, 4), 1).view(-1, 4)


# what the eight bits of a byte become: a lane of eight bytes, each 16 or 0
FIFTH_BITS = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).mul_(16).to(torch.uint8).view(torch.int64).view(256)


def fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """32 bits of each block, one for each weight in order, as 16 or 0: -> (B, 4) lanes."""
    bits = blocks[:, start : start + 4].to(torch.int32)
    return torch.index_select(FIFTH_BITS, 0, bits.reshape(-1)).view(-1, 4)


def unpack_q4_0(blocks: Tensor, out: Tensor) -> None:
    spread(out, lowered(nibbles(blocks, 2), 8), scale(blocks, 0))


def unpack_q4_1(blocks: Tensor, out: Tensor) -> None:
    spread(out, nibbles(blocks, 4), scale(blocks, 0), -scale(blocks, 2))


def unpack_q5_0(blocks: Tensor, out: Tensor) -> None:
    spread(out, lowered(nibbles(blocks, 6).bitwise_or_(fifth_bits(blocks, 2)), 16), scale(blocks, 0))


def unpack_q5_1(blocks: Tensor, out: Tensor) -> None:
    spread(out, nibbles(blocks, 8).bitwise_or_(fifth_bits(blocks, 4)), scale(blocks, 0), -scale(blocks, 2))


def unpack_iq4_nl(blocks: Tensor, out: Tensor) -> None:
    """Four bits choose one of sixteen values that lie closer together near zero."""
    chosen = nibbles(blocks, 2).view(torch.uint8).to(torch.int32).view(-1)
    out.copy_(torch.index_select(IQ4_NL_VALUES, 0, chosen).view(out.shape))
    out.mul_(scale(blocks, 0))


# ---- blocks of 256 ("K"), whose groups' scales are small integers times one or two fp16 numbers


def six_bit_pairs(blocks: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits in twelve bytes (Q4_K, Q5_K): -> two (B, 8) float32."""
    first, second, rest = blocks[:, start : start + 12].view(len(blocks), 3, 4).unbind(1)  # (B, 4) each
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=1)
    return scales.float(), minima.float()


def unpack_q2_k(blocks: Tensor, out: Tensor) -> None:
    factor = scale(blocks, 80) * (blocks[:, :16] & 15).float()  # (B, 16)
    minus = scale(blocks, 82) * (blocks[:, :16] >> 4).float()
    q = fields(lanes(blocks, 16, 80).view(-1, 2, 4), 2, (0, 2, 4, 6), 2)  # (B, 2 halves, 4 shifts, 4 lanes)
    spread(out, q, factor, minus)


def unpack_q3_k(blocks: Tensor, out: Tensor) -> None:
    low, high = blocks[:, 96:104], blocks[:, 104:108]  # 16 scales of six bits: four in `low`, two in `high`
    low = torch.cat([low & 15, low >> 4], dim=1)
    high = torch.cat([(high >> s) & 3 for s in (0, 2, 4, 6)], dim=1)
    factor = scale(blocks, 108) * ((low | (high << 4)).to(torch.int8) - 32).float()  # (B, 16)
    q = fields(lanes(blocks, 32, 96).view(-1, 2, 4), 2, (0, 2, 4, 6), 2)  # (B, 2, 4, 4)
    third = fields(lanes(blocks, 0, 32), 1, tuple(range(8)), 1).view(-1, 2, 4, 4)  # a third bit of 0 means minus four
    spread(out, lowered(q.bitwise_or_(third << 2), 4), factor)


def unpack_q4_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = six_bit_pairs(blocks, 4)
    q = fields(lanes(blocks, 16, 144).view(-1, 4, 4), 4, (0, 4), 2)  # (B, 4, 2, 4 lanes)
    spread(out, q, scale(blocks, 0) * scales, scale(blocks, 2) * minima)


def unpack_q5_k(blocks: Tensor, out: Tensor) -> None:
    scales, minima = six_bit_pairs(blocks, 4)
    q = fields(lanes(blocks, 48, 176).view(-1, 4, 4), 4, (0, 4), 2).view(-1, 8, 4)  # (B, 8 groups, 4 lanes)
    fifth = fields(lanes(blocks, 16, 48), 1, tuple(range(8)), 1)
    spread(out, q.bitwise_or_(fifth << 4), scale(blocks, 0) * scales, scale(blocks, 2) * minima)


def unpack_q6_k(blocks: Tensor, out: Tensor) -> None:
    factor = scale(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # (B, 16)
    q = fields(lanes(blocks, 0, 128).view(-1, 2, 8), 4, (0, 4), 2).view(-1, 2, 4, 4)  # (B, halves, 32 weights at a time, lanes)
    high = fields(lanes(blocks, 128, 192).view(-1, 2, 4), 2, (0, 2, 4, 6), 2)
    spread(out, lowered(q.bitwise_or_(high << 4), 32), factor)


_CODECS: dict[int, tuple[Unpack, Pack]] = {  # ggml id: out of the blocks, into them
    0: (unpack_f32, pack.pack_f32),
    1: (unpack_f16, pack.pack_f16),
    2: (unpack_q4_0, pack.pack_q4_0),
    3: (unpack_q4_1, pack.pack_q4_1),
    6: (unpack_q5_0, pack.pack_q5_0),
    7: (unpack_q5_1, pack.pack_q5_1),
    8: (unpack_q8_0, pack.pack_q8_0),
    10: (unpack_q2_k, pack.pack_q2_k),
    11: (unpack_q3_k, pack.pack_q3_k),
    12: (unpack_q4_k, pack.pack_q4_k),
    13: (unpack_q5_k, pack.pack_q5_k),
    14: (unpack_q6_k, pack.pack_q6_k),
    20: (unpack_iq4_nl, pack.pack_iq4_nl),
    30: (unpack_bf16, pack.pack_bf16),
}
FORMATS: dict[int, Format] = {number: Format(*LAYOUTS[number], *codec) for number, codec in _CODECS.items()}
