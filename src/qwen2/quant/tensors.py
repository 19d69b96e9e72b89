"""Whole tensors to and from the block formats: `dequantize`, `dequantize_rows`, `quantize`.

Work goes piece by piece, so that the temporary memory stays at a few MB per thread whatever the tensor's size.
What is left out: computing with the blocks as they are, which the kernels do.

    weight = dequantize(file.raw("blk.0.ffn_up.weight"), 12, (4864, 896))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from qwen2.quant.formats import FORMATS, Format

PIECE = 1 << 18  # weights unpacked at a time: 1 MB of float32 stays in a core's cache
UNSHARED = 31 << 10  # weights; torch shares out operations on 32768 elements or more


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


@torch.inference_mode(False)  # the threads that write do not share the caller's mode
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


def unpack_into(form: Format, data: Tensor, out: Tensor) -> None:
    """Unpack whole blocks, flat bytes to flat weights, each thread some pieces."""
    blocks, weights = data.view(-1, form.bytes), out.view(-1, form.block)  # (B, bytes), (B, block)
    step = PIECE // form.block
    in_threads(lambda start: _unpack(form, blocks[start : start + step], weights[start : start + step]), range(0, len(blocks), step))


@torch.no_grad()
def _unpack(form: Format, blocks: Tensor, out: Tensor) -> None:
    step = (PIECE if torch.get_num_threads() == 1 else UNSHARED) // form.block
    for start in range(0, len(blocks), step):
        place = out[start : start + step]
        if out.dtype == torch.float32:
            form.unpack(blocks[start : start + step], place)
        else:
            weights = torch.empty(place.shape)
            form.unpack(blocks[start : start + step], weights)
            place.copy_(weights)


def in_threads(work: Callable[[int], None], starts: Sequence[int]) -> None:
    """Call `work` for each start, on as many threads as torch would use, each of them with torch's own threads off.

    Sharing out each of a dozen short operations costs a wait per operation, which on a busy machine made loading thirty times
    slower; sharing out whole pieces does not. The setting is put back; a thread that first uses torch meanwhile would keep 1.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(starts) < 2:
        for start in starts:
            work(start)
        return
    try:
        with ThreadPoolExecutor(min(threads, len(starts)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, starts):
                pass
    finally:
        torch.set_num_threads(threads)


def dequantize_rows(raw: np.ndarray | Tensor, ggml_type: int, columns: int, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Only these rows of a matrix, as an embedding needs them: (R,) row numbers -> (R, columns).

    On the calling thread alone: it runs while serving, where `in_threads` would change torch's thread count under the others.
    """
    form = format_of(ggml_type)
    if columns % form.block:
        raise ValueError(f"rows of {columns} weights are not whole {form.name} blocks of {form.block}")
    chosen = as_bytes(raw).view(-1, form.size(columns))[rows]  # (R, bytes of a row)
    out = torch.empty(len(rows), columns, dtype=dtype)
    _unpack(form, chosen.view(-1, form.bytes), out.view(-1, form.block))
    return out


@torch.no_grad()
def quantize(tensor: Tensor, ggml_type: int) -> np.ndarray:
    """Pack a tensor: (..., columns) -> flat uint8 array.

    Raises ValueError for an unknown format, for rows that are not whole blocks, and for weights in blocks that are not finite.
    """
    form = format_of(ggml_type)
    if tensor.shape[-1] % form.block:
        raise ValueError(f"rows of {tensor.shape[-1]} weights are not whole {form.name} blocks of {form.block}")
    if form.block > 1 and not bool(tensor.isfinite().all()):
        raise ValueError(f"a block of {form.name} holds no NaN and no infinity, and these weights do")
    blocks = tensor.detach().contiguous().view(-1, form.block)
    packed = np.empty(form.size(blocks.numel()), dtype=np.uint8)
    place = torch.from_numpy(packed).view(-1, form.bytes)
    step = max(1, PIECE // form.block)

    def work(start: int) -> None:
        with torch.no_grad():
            place[start : start + step] = form.pack(blocks[start : start + step]).view(-1, form.bytes)

    in_threads(work, range(0, len(blocks), step))
    return packed
