"""The bounded GGUF reader on files that lie: each with the exact message, and no memory taken on the word of the file."""

from __future__ import annotations

import re
import struct
import tracemalloc
from array import array
from pathlib import Path

import gguf
import numpy as np
import pytest

from qwen2.weights.gguf_header import MAX_HEADER, read_header

AGAIN = "the file is damaged or incomplete: download it again"
ELSEWHERE = "no model needs this: take the file from another source"


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def row(name: str, lengths: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(lengths)}QIQ", len(lengths), *lengths, kind, offset)


def build(keys: list[bytes] | None = None, rows: list[bytes] | None = None, data: int = 128, version: int = 3, **counts: int) -> bytes:
    """A file of these keys and rows, well-formed unless they are not, with `data` bytes after the padding to 32."""
    keys, rows = keys or [], rows or []
    head = b"GGUF" + struct.pack("<IQQ", version, counts.get("num_tensors", len(rows)), counts.get("num_keys", len(keys)))
    head += b"".join(keys) + b"".join(rows)
    return head + bytes(-len(head) % 32) + bytes(data)


GOOD = build([key("a", 4, struct.pack("<I", 7))], [row("t"), row("u", (8, 4), 0, 128)], data=256)

# case: bytes, message after the path
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "this is empty, at byte 0; take a .gguf file"),
    "zip": (b"PK\x03\x04" + bytes(60), "this is a zip archive, at byte 0; take a .gguf file"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1",
        "this is a Git LFS pointer, not the file itself, at byte 0; take a .gguf file",
    ),
    "before gguf": (b"tjgg" + bytes(60), "this is an old llama.cpp format from before GGUF, at byte 0; take a .gguf file"),
    "wrong magic": (b"GGUX" + GOOD[4:], "not a GGUF file: it begins with b'GGUX', at byte 0; take a .gguf file"),
    "cut in the magic": (b"GG", "not a GGUF file: it begins with b'GG', at byte 0; take a .gguf file"),
    "cut in the version": (GOOD[:6], f"the version takes 4 bytes and 2 are left, at byte 4; {AGAIN}"),
    "version 1": (
        build(version=1),
        "GGUF in version 1 is not supported, only versions 2 and 3 in little-endian order, at byte 4; convert it anew with llama.cpp",
    ),
    "big-endian": (
        build(version=3 << 24),
        "GGUF in big-endian byte order is not supported, only versions 2 and 3 in little-endian order, at byte 4; "
        "convert it anew with llama.cpp",
    ),
    "cut in the counts": (GOOD[:12], f"the number of tensors takes 8 bytes and 4 are left, at byte 8; {AGAIN}"),
    "2^62 tensors": (build(num_tensors=2**62), f"{2**62} tensors are announced, more than 65536, at byte 8; {AGAIN}"),
    "2^62 keys": (build(num_keys=2**62), f"{2**62} metadata keys are announced, more than 16384, at byte 16; {AGAIN}"),
    "cut in a key": (GOOD[:28], f"the length of key 0 takes 8 bytes and 4 are left, at byte 24; {AGAIN}"),
    "key past the end": (build([struct.pack("<Q", 2**62)]), f"key 0 has {2**62} bytes and 128 are left, at byte 24; {AGAIN}"),
    "key of 100 kB": (build([key("k" * 100_000, 7, b"\1")]), f"key 0 has 100000 bytes, more than 65536, at byte 24; {ELSEWHERE}"),
    "key twice": (build([key("a", 7, b"\0"), key("a", 7, b"\1")]), f"key 'a' occurs twice, at byte 38; {AGAIN}"),
    "key not UTF-8": (build([key(b"ab\xff", 7, b"\0")]), f"key 0 is not valid UTF-8, at byte 34; {AGAIN}"),
    "string not UTF-8": (build([key("a", 8, text(b"ab\xffc"))]), f"the value of key 'a' is not valid UTF-8, at byte 47; {AGAIN}"),
    "string past the end": (
        build([key("a", 8, struct.pack("<Q", 2**63))]),
        f"the value of key 'a' has {2**63} bytes and 147 are left, at byte 37; {AGAIN}",
    ),
    "string of 5 MB": (
        build([key("a", 8, text("x" * 5_000_000))]),
        f"the value of key 'a' has 5000000 bytes, more than 4194304, at byte 37; {ELSEWHERE}",
    ),
    "unknown value type": (build([key("a", 13, b"")]), f"key 'a' has the unknown type 13, at byte 33; {AGAIN}"),
    "boolean 2": (build([key("a", 7, b"\2")]), f"the value of key 'a' is a boolean of value 2, at byte 37; {AGAIN}"),
    "boolean 3 in an array": (
        build([key("a", 9, struct.pack("<IQ", 7, 2) + b"\1\3")]),
        f"key 'a' has a boolean of value 3, at byte 49; {AGAIN}",
    ),
    "array of 2^61 numbers": (
        build([key("a", 9, struct.pack("<IQ", 10, 2**61))]),
        f"key 'a' has {2**61} elements in {2**64} bytes and 143 are left, at byte 49; {AGAIN}",
    ),
    "array of 2^40 strings": (
        build([key("a", 9, struct.pack("<IQ", 8, 2**40))]),
        f"key 'a' has {2**40} strings and 143 bytes are left, at byte 49; {AGAIN}",
    ),
    "string in an array past the end": (
        build([key("a", 9, struct.pack("<IQQQ", 8, 2, 0, 2**40))]),
        f"string 1 of key 'a' has {2**40} bytes and 159 are left, at byte 57; {AGAIN}",
    ),
    "string in an array not UTF-8": (
        build([key("a", 9, struct.pack("<IQ", 8, 2) + text("fine") + text(b"\xc3"))]),
        f"string 1 of key 'a' is not valid UTF-8, at byte 69; {AGAIN}",
    ),
    "nested arrays": (
        build([key("a", 9, struct.pack("<IQ", 9, 1) * 10_000)]),
        f"key 'a' is an array of arrays, which is not supported, at byte 37; {AGAIN}",
    ),
    "array of unknown type": (
        build([key("a", 9, struct.pack("<IQ", 99, 1))]),
        f"key 'a' is an array of the unknown type 99, at byte 37; {AGAIN}",
    ),
    "alignment 3": (
        build([key("general.alignment", 4, struct.pack("<I", 3))]),
        f"general.alignment 3 is not a power of two up to 1048576 of type UINT32, at byte 49; {AGAIN}",
    ),
    "alignment 0": (
        build([key("general.alignment", 4, struct.pack("<I", 0))]),
        f"general.alignment 0 is not a power of two up to 1048576 of type UINT32, at byte 49; {AGAIN}",
    ),
    "alignment of type UINT8": (
        build([key("general.alignment", 0, b"\x20")]),
        f"general.alignment 32 is not a power of two up to 1048576 of type UINT32, at byte 49; {AGAIN}",
    ),
    "tensor name of 65 bytes": (build([], [row("n" * 65)]), f"the name of tensor 0 has 65 bytes, more than 64, at byte 24; {ELSEWHERE}"),
    "no dimensions": (build([], [row("t", ())]), f"tensor 't' has 0 dimensions, not 1 to 4, at byte 33; {AGAIN}"),
    "2^31 dimensions": (
        build([], [text("t") + struct.pack("<I", 2**31)]),
        f"tensor 't' has {2**31} dimensions, not 1 to 4, at byte 33; {AGAIN}",
    ),
    "dimension 2^62": (
        build([], [row("t", (2**62, 32))]),
        f"tensor 't' has the impossible shape (32, {2**62}), at byte 24; {AGAIN}",
    ),
    "dimensions that overflow to 0": (
        build([], [row("t", (2**32, 2**32))]),
        f"tensor 't' has the impossible shape ({2**32}, {2**32}), at byte 24; {AGAIN}",
    ),
    "dimension 0": (build([], [row("t", (0, 32))]), f"tensor 't' has the impossible shape (32, 0), at byte 24; {AGAIN}"),
    "unknown quantization": (
        build([], [row("t", (32,), 4)]),
        "tensor 't' has the unknown type 4, at byte 24; a newer program wrote it: take a Q4_K_M or Q8_0 file",
    ),
    "half a block": (
        build([], [row("t", (48, 2), 8)]),
        f"tensor 't' has rows of 48 weights, which are not whole Q8_0 blocks of 32, at byte 24; {AGAIN}",
    ),
    "tensor twice": (build([], [row("t"), row("t", offset=128)], 256), f"tensor 't' occurs twice, at byte 57; {AGAIN}"),
    "offset not aligned": (
        build([], [row("t", offset=16)]),
        f"tensor 't' has offset 16, not a multiple of 32, at byte 24; {AGAIN}",
    ),
    "offset past the end": (
        build([], [row("t", offset=2**60)]),
        f"tensor 't' ends at byte {2**60 + 64 + 128} and the file has 192, at byte 24; {AGAIN}",
    ),
    "tensor past the end": (
        build([], [row("t", (64,))]),
        f"tensor 't' ends at byte 320 and the file has 192, at byte 24; {AGAIN}",
    ),
    "tensors overlap": (
        build([], [row("t"), row("u", offset=96), row("v", offset=256)], 512),
        f"tensors 't' and 'u' overlap, at byte 224; {AGAIN}",
    ),
    "cut in a tensor's row": (GOOD[:60], f"the shape of tensor 't' takes 8 bytes and 6 are left, at byte 54; {AGAIN}"),
    "data cut off": (GOOD[:-1], f"tensor 'u' ends at byte 384 and the file has 383, at byte 74; {AGAIN}"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_lying_file_is_one_exact_error(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(error.value) == f"{path}: {message}"
    assert peak < len(data) + 1_000_000


def test_every_cut_of_a_good_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
            read_header(path)
    path.write_bytes(GOOD)
    assert list(read_header(path).tensors) == ["t", "u"]


def test_a_header_above_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(build([key("a", 9, struct.pack("<IQ", 0, MAX_HEADER))], data=0))
    with path.open("r+b") as file:
        file.truncate(2 * MAX_HEADER)  # sparse
    with pytest.raises(ValueError) as error:
        read_header(path)
    assert str(error.value) == f"{path}: the header is larger than {MAX_HEADER} bytes, at byte 49; {ELSEWHERE}"


def test_many_tiny_strings_take_little_more_than_the_file(tmp_path: Path) -> None:
    count = 200_000
    path = tmp_path / "model.gguf"
    path.write_bytes(build([key("a", 9, struct.pack("<IQ", 8, count) + text("ab") * count)]))
    tracemalloc.start()
    values = read_header(path).metadata["a"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values[0] == values[count - 1] == "ab"
    assert peak < path.stat().st_size * 1.2 + 4 * count * 1.2 + 2_000_000  # the header, four bytes a string, and a piece


def test_every_type_of_value_is_read_back(tmp_path: Path) -> None:
    """The gguf package's writer is the witness of what the bytes mean."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    types = gguf.GGUFValueType
    scalars = {
        "u8": (255, types.UINT8), "i8": (-128, types.INT8), "u16": (65535, types.UINT16), "i16": (-32768, types.INT16),
        "u32": (2**32 - 1, types.UINT32), "i32": (-(2**31), types.INT32), "u64": (2**64 - 1, types.UINT64),
        "i64": (-(2**63), types.INT64), "f32": (0.5, types.FLOAT32), "f64": (0.1, types.FLOAT64), "true": (True, types.BOOL),
        "text": ("naïve 千问", types.STRING),
    }  # fmt: skip
    for name, (value, kind) in scalars.items():
        writer.add_key_value(name, value, kind)
    writer.add_key_value("words", ["a", "", "千问", "🙂"], types.ARRAY, types.STRING)
    writer.add_key_value("numbers", [1, -2, 3], types.ARRAY, types.INT32)
    writer.add_key_value("reals", [0.5, -2.0], types.ARRAY, types.FLOAT64)
    writer.add_custom_alignment(64)
    writer.add_tensor("t", np.zeros((3, 5), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(tmp_path / "model.gguf")
    for name, (value, _) in scalars.items():
        assert header.metadata[name] == value
        assert type(header.metadata[name]) is type(value)
    words = header.metadata["words"]
    assert list(words) == ["a", "", "千问", "🙂"]
    assert words[-1] == "🙂"
    assert words[1:3] == ["", "千问"]
    assert words == ["a", "", "千问", "🙂"]
    assert header.metadata["numbers"] == array("i", [1, -2, 3])
    assert header.metadata["reals"] == array("d", [0.5, -2.0])
    assert header.alignment == 64
    assert header.tensors["t"].shape == (3, 5)
    assert header.tensors["t"].offset % 64 == 0


@pytest.mark.parametrize("model", [pytest.param("coder", marks=pytest.mark.slow), "smollm"])
def test_real_headers_are_what_the_gguf_package_reads(model: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(model)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, field in fields.items():
        value = field.contents()
        assert (list(ours.metadata[name]) if isinstance(value, list) else ours.metadata[name]) == value, name
    table = {info.name: (info.shape, info.type, info.offset, info.nbytes) for info in ours.tensors.values()}
    assert table == {t.name: (tuple(map(int, t.shape[::-1])), int(t.tensor_type), t.data_offset, t.n_bytes) for t in theirs.tensors}
