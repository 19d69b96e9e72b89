"""The safetensors header check: good files of the library read the same, lying ones are one exact error each."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen2.weights.safetensors_header import MAX_HEADER, read_safetensors_header

AGAIN = "the file is damaged or incomplete: download it again"


def file(header: object, data: int = 0, length: int | None = None) -> bytes:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + bytes(data)


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_library_s_files_are_read_alike(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(0, 3, dtype=torch.bfloat16), "c": torch.tensor(7), "d": torch.ones(5) > 0}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_safetensors_header(path)
    assert {name: (extent.dtype, extent.shape) for name, extent in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (0, 3)),
        "c": ("I64", ()),
        "d": ("BOOL", (5,)),
    }
    data = path.read_bytes()
    for name, extent in found.items():
        assert data[extent.start : extent.stop] == tensors[name].view(-1).view(torch.uint8).numpy().tobytes()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", f"a safetensors file has at least 8 bytes, this one 0, at byte 0; {AGAIN}"),
    "length past the end": (file({}, length=2**63), f"the header has {2**63} bytes and 2 are left, at byte 0; {AGAIN}"),
    "length above the limit": (
        file(b"{" + b" " * MAX_HEADER + b"}"),
        f"the header has {MAX_HEADER + 2} bytes, more than {MAX_HEADER}, at byte 0; no model needs this: take the file from another source",
    ),
    "not JSON": (file(b'{"a": }'), f"the header is not JSON: Expecting value, at byte 14; {AGAIN}"),
    "not UTF-8": (file(b'{"a\xff": 1}'), f"the header is not valid UTF-8, at byte 11; {AGAIN}"),
    "not an object": (file([]), f"the header is not a JSON object, at byte 8; {AGAIN}"),
    "name twice": (file(b'{"a": 1, "a": 2}'), f"the header's key 'a' occurs twice, at byte 8; {AGAIN}"),
    "shape twice": (
        file(b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 8]}}', 8),
        f"the header's key 'shape' occurs twice, at byte 8; {AGAIN}",
    ),
    "metadata of numbers": (file({"__metadata__": {"a": 1}}), f"the header's __metadata__ is not an object of strings, at byte 8; {AGAIN}"),
    "no offsets": (
        file({"t": {"dtype": "F32", "shape": [1]}}, 4),
        f"tensor 't' is not described by dtype, shape and data_offsets, at byte 8; {AGAIN}",
    ),
    "unknown type": (
        file({"t": entry("F4")}, 24),
        "tensor 't' has the unknown type 'F4', at byte 8; known are BOOL, U8, I8, F8_E4M3, F8_E5M2, F8_E8M0, U16, I16, F16, BF16, "
        "U32, I32, F32, U64, I64, F64, C64",
    ),
    "2^62 weights": (file({"t": entry(shape=[2**62, 2])}, 24), f"tensor 't' has the impossible shape [{2**62}, 2], at byte 8; {AGAIN}"),
    "shape below 0": (file({"t": entry(shape=[-2, -3])}, 24), f"tensor 't' has the impossible shape [-2, -3], at byte 8; {AGAIN}"),
    "shape of true": (file({"t": entry(shape=[True])}, 24), f"tensor 't' has the impossible shape [True], at byte 8; {AGAIN}"),
    "offsets backwards": (
        file({"t": entry(offsets=[24, 0])}, 24),
        f"tensor 't' has the impossible data_offsets [24, 0], at byte 8; {AGAIN}",
    ),
    "one offset": (file({"t": entry(offsets=[24])}, 24), f"tensor 't' has the impossible data_offsets [24], at byte 8; {AGAIN}"),
    "offset past the end": (file({"t": entry()}, 23), f"tensor 't' ends at byte 97 and the file has 96, at byte 8; {AGAIN}"),
    "extent and shape differ": (
        file({"t": entry("BF16")}, 24),
        f"tensor 't' has 24 bytes, its shape [2, 3] as BF16 takes 12, at byte 74; {AGAIN}",
    ),
    "overlap": (
        file({"a": entry(), "b": entry(offsets=[20, 44])}, 44),
        f"tensor 'b' overlaps the one before it, at byte 159; {AGAIN}",
    ),
    "gap": (file({"a": entry(offsets=[4, 28])}, 28), f"tensor 'a' leaves a gap before it, at byte 77; {AGAIN}"),
    "bytes of nobody": (file({"a": entry()}, 30), f"6 bytes after the last tensor belong to none, at byte 97; {AGAIN}"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_lying_file_is_one_exact_error(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_safetensors_header(path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"9" * 10_000 + b"}"])
def test_json_bombs_are_refused(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file(body))
    with pytest.raises(ValueError, match="the header is not JSON"):
        read_safetensors_header(path)
