"""Whole tensors to and from the block formats: `dequantize`, `dequantize_rows`, `quantize`.

Work goes piece by piece, so that the temporary memory stays at some ten MB whatever the tensor's size; torch's own threads
share each piece. What is left out: computing with the blocks as they are, which the kernels do.

    weight = dequantize(file.raw("blk.0.ffn_up.weight"), 12, (4864, 896))
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from qwen2.quant.formats import FORMATS, Format

PIECE = 1 << 18  # weights unpacked at a time: 1 MB of float32 stays in a core's cache


def format_of(ggml_type: int) -> Format:
    """The format with this ggml id, or a ValueError that names those there are."""
    if ggml_type not in FORMATS:
        raise ValueError(f"ggml type {ggml_type} is not supported; supported are {', '.join(f.name for f in FORMATS.values())}")
    return FORMATS[ggml_type]


def format_id(name: str) -> int:
    """The ggml id of a format by its name, in any case: "q8_0" -> 8."""
    for number, form in FORMATS.items():
        if form.name == name.upper():
            return number
    raise ValueError(f"quantization {name!r} is not known; known are {', '.join(f.name for f in FORMATS.values())}")


def as_bytes(raw: np.ndarray | Tensor) -> Tensor:
    """Flat uint8 tensor over the same memory (a read-only array is copied, which torch cannot share safely)."""
    if isinstance(raw, np.ndarray):
        raw = torch.from_numpy(raw if raw.flags.writeable else raw.copy())
    assert raw.dtype == torch.uint8, f"raw blocks are uint8, not {raw.dtype}"
    return raw.reshape(-1)


def dequantize(
    raw: np.ndarray | Tensor, ggml_type: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """Unpack a tensor's bytes into `out` (contiguous, any float dtype), or into a new tensor of `dtype` with this shape.

    Raises ValueError if the type is unknown, a row is not whole blocks, or the bytes are not exactly those of the shape.
    """
    form = format_of(ggml_type)
    if shape and shape[-1] % form.block:
        raise ValueError(f"rows of {shape[-1]} weights are not whole {form.name} blocks of {form.block}")
    data = as_bytes(raw)
    if data.numel() != form.size(math.prod(shape)):
        raise ValueError(f"shape {shape} as {form.name} takes {form.size(math.prod(shape))} bytes, not {data.numel()}")
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    assert out.numel() == math.prod(shape), f"{tuple(out.shape)} has no place for {shape}"
    assert out.is_contiguous(), "the place to unpack into is not contiguous"
    unpack_into(form, data, out.view(-1))
    return out


@torch.no_grad()
def unpack_into(form: Format, data: Tensor, out: Tensor) -> None:
    """Unpack whole blocks, flat bytes to flat weights, a piece at a time."""
    blocks = data.view(-1, form.bytes)  # (B, bytes)
    step = max(1, PIECE // form.block)
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step]
        place = out[start * form.block : start * form.block + len(piece) * form.block].view(-1, form.block)
        if place.dtype == torch.float32:
            form.unpack(piece, place)
        else:
            weights = torch.empty(place.shape)
            form.unpack(piece, weights)
            place.copy_(weights)


def dequantize_rows(raw: np.ndarray | Tensor, ggml_type: int, columns: int, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Only these rows of a matrix, as an embedding needs them: (R,) row numbers -> (R, columns)."""
    form = format_of(ggml_type)
    if columns % form.block:
        raise ValueError(f"rows of {columns} weights are not whole {form.name} blocks of {form.block}")
    chosen = as_bytes(raw).view(-1, form.size(columns))[rows]  # (R, bytes of a row)
    return dequantize(chosen.contiguous(), ggml_type, (len(rows), columns), dtype)


@torch.no_grad()
def quantize(tensor: Tensor, ggml_type: int) -> np.ndarray:
    """Pack a tensor: (..., columns) -> flat uint8 array, the bytes that the gguf package would write.

    Raises ValueError for a format that is only read, and for rows that are not whole blocks.
    """
    form = format_of(ggml_type)
    if form.pack is None:
        able = ", ".join(f.name for f in FORMATS.values() if f.pack is not None)
        raise ValueError(f"{form.name} can be read but not written; written can be {able}")
    if tensor.shape[-1] % form.block:
        raise ValueError(f"rows of {tensor.shape[-1]} weights are not whole {form.name} blocks of {form.block}")
    blocks = tensor.detach().contiguous().view(-1, form.block)
    packed = np.empty(form.size(blocks.numel()), dtype=np.uint8)
    place = torch.from_numpy(packed).view(-1, form.bytes)
    step = max(1, PIECE // form.block)
    for start in range(0, len(blocks), step):
        place[start : start + step] = form.pack(blocks[start : start + step]).view(-1, form.bytes)
    return packed
