"""Checking the header of a safetensors file before its library maps it: sizes, names, types and extents.

The header is JSON, so its length is limited before it is parsed (parsing takes up to some thirty times its size); every tensor
must be exactly as large as its shape says and the tensors must cover the data without gap or overlap, as the format demands.
Whatever is wrong raises one ValueError: the file, what, at which byte, and what to do.

What is left out: reading the tensors, which the `safetensors` library does.

    read_safetensors_header(Path("model.safetensors"))["model.norm.weight"].shape
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

MAX_HEADER = 4 << 20  # bytes; the one of a 57B mixture of experts in a single file would have 0.7 MB
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 62
BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
AGAIN = "the file is damaged or incomplete: download it again"


@dataclass(frozen=True, slots=True)
class TensorExtent:
    """One tensor of a safetensors file; `start` and `stop` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _DuplicateKeyError(ValueError):
    """A key that occurs twice in one JSON object."""


def read_safetensors_header(path: Path) -> dict[str, TensorExtent]:
    """The tensors that the header names, in its order. Raises ValueError (see above), or OSError if the file cannot be opened."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 8:
            _fail(path, f"a safetensors file has at least 8 bytes, this one {size}", 0)
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            _fail(path, f"the header has {length} bytes and {size - 8} are left", 0)
        if length > MAX_HEADER:
            what = f"the header has {length} bytes, more than {MAX_HEADER}"
            _fail(path, what, 0, "no model needs this: take the file from another source")
        text = stream.read(length)
    values = _parse(path, text)
    _check_metadata(path, values.pop("__metadata__", {}))
    tensors = {name: _read_tensor(path, name, entry, 8 + length, size) for name, entry in values.items()}
    _check_cover(path, tensors, 8 + length, size)
    return tensors


def _fail(path: Path, what: str, at: int, do: str = AGAIN) -> NoReturn:
    raise ValueError(f"{path}: {what}, at byte {at}; {do}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(f"{twice!r} occurs twice")
    return values


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        _fail(path, f"the header's key {error}", 8)
    except UnicodeDecodeError as error:
        _fail(path, "the header is not valid UTF-8", 8 + error.start)
    except json.JSONDecodeError as error:
        _fail(path, f"the header is not JSON: {error.msg}", 8 + error.pos)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of nested brackets
        _fail(path, f"the header is not JSON that can be read: {error}", 8)
    if not isinstance(values, dict):
        _fail(path, "the header is not a JSON object", 8)
    return values


def _check_metadata(path: Path, values: Any) -> None:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        _fail(path, "the header's __metadata__ is not an object of strings", 8)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_ELEMENTS for item in value)


def _read_tensor(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorExtent:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _fail(path, f"tensor {name!r} is not described by dtype, shape and data_offsets", 8)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        _fail(path, f"tensor {name!r} has the unknown type {str(dtype)[:40]!r}", 8, f"known are {', '.join(BYTES)}")
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS or prod(shape) > MAX_ELEMENTS:
        _fail(path, f"tensor {name!r} has the impossible shape {str(shape)[:80]}", 8)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(path, f"tensor {name!r} has the impossible data_offsets {str(offsets)[:80]}", 8)
    start, stop = data_start + offsets[0], data_start + offsets[1]
    if stop > size:
        _fail(path, f"tensor {name!r} ends at byte {stop} and the file has {size}", 8)
    if stop - start != prod(shape) * BYTES[dtype]:
        _fail(path, f"tensor {name!r} has {stop - start} bytes, its shape {shape} as {dtype} takes {prod(shape) * BYTES[dtype]}", start)
    return TensorExtent(dtype, tuple(shape), start, stop)


def _check_cover(path: Path, tensors: dict[str, TensorExtent], data_start: int, size: int) -> None:
    """The tensors lie one after the other from the header's end to the file's."""
    end = data_start
    for name, extent in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if extent.start != end:
            what = "overlaps the one before it" if extent.start < end else "leaves a gap before it"
            _fail(path, f"tensor {name!r} {what}", extent.start)
        end = extent.stop
    if end != size:
        _fail(path, f"{size - end} bytes after the last tensor belong to none", end)
