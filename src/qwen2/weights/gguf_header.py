"""Reading the header of a GGUF file that may be damaged or made to do harm: metadata, and where each tensor lies.

Every count is held against the bytes that are left before anything is allocated for it; the header as a whole, the number of
keys and of tensors are limited; so the memory used is at most the file's size plus a constant, and the time is bounded. Whatever
is wrong raises one ValueError: the file, what, at which byte, and what to do. Strings must be valid UTF-8.

What is left out, and why:
1) big-endian files and version 1, which nobody publishes; they are refused by name;
2) arrays of arrays, which the format allows and no model uses (llama.cpp refuses them too);
3) what the metadata mean: `config/gguf.py` and the tokenizer read them.

    header = read_header(Path("model.gguf"))
    header.metadata["general.architecture"], header.tensors["token_embd.weight"].shape
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import IO, NoReturn, overload

import numpy as np

from qwen2.quant.layout import LAYOUTS

MAX_HEADER = 64 << 20  # bytes; the largest vocabularies published take some 20 MB
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 1 << 16
MAX_NAME_BYTES = 64  # the format's own limit for tensor names
MAX_STRING = 4 << 20  # of one value; the longest chat templates published have some 20 kB
MAX_DIMENSIONS = 4
MAX_WEIGHTS = 1 << 62
MAX_ALIGNMENT = 1 << 20
TOGETHER = 8192  # strings of an array that are decoded at once
WINDOW = 1 << 18  # bytes in which the strings of an array are looked for at once
LENGTH = struct.Struct("<Q")

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF value type: struct code
STRING, ARRAY, UINT32 = 8, 9, 4
AGAIN = "the file is damaged or incomplete: download it again"


class StringArray(Sequence[str]):
    """The strings of an array, decoded as they are asked for: the header's bytes and one position each, not one object each."""

    def __init__(self, data: bytearray, starts: array[int]) -> None:
        self._data, self._starts = data, starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._text(start) for start in self._starts[index]]
        return self._text(self._starts[index])

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._texts(first) for first in range(0, len(self), TOGETHER))

    def _texts(self, first: int) -> list[str]:
        """TOGETHER strings, or those that are left: decoded at once and cut apart, five times as fast as one by one."""
        count = min(TOGETHER, len(self) - first)
        texts = self._joined(first, count).decode()[1:].split("\0")
        return texts if len(texts) == count else self[first : first + count]  # where a string has the separator in it

    def _joined(self, first: int, count: int) -> bytes:
        """Strings, each after a zero byte: UTF-8 exactly where every one of them is."""
        starts = np.array(self._starts[first : first + count], dtype=np.int64)
        begin, last = int(starts[0]), int(starts[-1])
        starts -= begin
        data = np.frombuffer(self._data[begin : last + 8 + LENGTH.unpack_from(self._data, last)[0]], dtype=np.uint8)
        data[starts] = 0
        keep = np.ones(len(data), dtype=bool)
        for i in range(1, 8):  # of the eight bytes of a length one becomes the separator
            keep[starts + i] = False
        return data[keep].tobytes()

    def bad_text(self) -> tuple[int, int] | None:
        """Which string is the first that is not UTF-8, and from which byte of the header on; None where all are."""
        for first in range(0, len(self), TOGETHER):
            try:
                self._joined(first, min(TOGETHER, len(self) - first)).decode()
            except UnicodeDecodeError:
                for i in range(first, len(self)):
                    try:
                        self[i]
                    except UnicodeDecodeError as error:
                        return i, self._starts[i] + 8 + error.start
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"StringArray of {len(self)}: {self[:3]}..."

    def _text(self, start: int) -> str:
        (length,) = LENGTH.unpack_from(self._data, start)
        return self._data[start + 8 : start + 8 + length].decode("utf-8")


Value = int | float | bool | str | StringArray | array  # type: ignore[type-arg]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `shape` as torch has it (rows first), `type` the ggml id, `offset` from the start of its file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int
    part: int = 0

    @property
    def type_name(self) -> str:
        return LAYOUTS[self.type].name


@dataclass(frozen=True)
class Header:
    """What one GGUF file says before its data."""

    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    alignment: int
    data_offset: int
    file_size: int


class Cursor:
    """Reads forward through the header, and fails with the position when the file cannot hold what it claims."""

    def __init__(self, path: Path, stream: IO[bytes], size: int) -> None:
        self.path, self.stream, self.size = path, stream, size
        self.data = bytearray()
        self.at = 0

    def fail(self, what: str, at: int | None = None, do: str = AGAIN) -> NoReturn:
        raise ValueError(f"{self.path}: {what}, at byte {self.at if at is None else at}; {do}")

    def need(self, count: int, what: str) -> None:
        """Have the next `count` bytes in memory."""
        end = self.at + count
        if end <= len(self.data):
            return
        if end > self.size:
            self.fail(f"{what} takes {count} bytes and {self.size - self.at} are left")
        if end > MAX_HEADER:
            self.fail(f"the header is larger than {MAX_HEADER} bytes", do="no model needs this: take the file from another source")
        while len(self.data) < end:
            piece = self.stream.read(min(max(end - len(self.data), 1 << 20), self.size - len(self.data)))
            if not piece:
                self.fail(f"{what} could not be read: the file became shorter while it was read")
            self.data += piece

    def number(self, code: str, what: str) -> int | float:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        if code == "?" and self.data[self.at] > 1:
            self.fail(f"{what} is a boolean of value {self.data[self.at]}")
        self.at += size
        assert isinstance(value, int | float)
        return value

    def count(self, code: str, what: str) -> int:
        return int(self.number(code, what))

    def string(self, limit: int, what: str) -> str:
        start = self.at
        length = self.count("Q", f"the length of {what}")
        if length > self.size - self.at:
            self.fail(f"{what} has {length} bytes and {self.size - self.at} are left", start)
        if length > limit:
            self.fail(f"{what} has {length} bytes, more than {limit}", start, "no model needs this: take the file from another source")
        self.need(length, what)
        self.at += length
        return self.text(self.at - length, self.at, what)

    def text(self, start: int, stop: int, what: str) -> str:
        try:
            return self.data[start:stop].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not valid UTF-8", start + error.start)


def read_header(path: Path) -> Header:
    """Read and check the header of one GGUF file. Raises ValueError (see above), or OSError if the file cannot be opened."""
    with path.open("rb", buffering=0) as stream:
        cursor = Cursor(path, stream, os.fstat(stream.fileno()).st_size)
        version = read_version(cursor)
        num_tensors = cursor.count("Q", "the number of tensors")
        num_keys = cursor.count("Q", "the number of keys")
        if num_tensors > MAX_TENSORS:
            cursor.fail(f"{num_tensors} tensors are announced, more than {MAX_TENSORS}", 8)
        if num_keys > MAX_KEYS:
            cursor.fail(f"{num_keys} metadata keys are announced, more than {MAX_KEYS}", 16)
        metadata: dict[str, Value] = {}
        alignment = 32
        for i in range(num_keys):
            start = cursor.at
            key = cursor.string(MAX_KEY_BYTES, f"key {i}")
            if key in metadata:
                cursor.fail(f"key {key!r} occurs twice", start)
            kind_at = cursor.at
            kind = cursor.count("I", f"the type of key {key!r}")
            metadata[key] = read_value(cursor, kind, key)
            if key == "general.alignment":
                alignment = check_alignment(cursor, kind, metadata[key], kind_at)
        return Header(version, metadata, *read_tensors(cursor, num_tensors, alignment), cursor.size)


def read_version(cursor: Cursor) -> int:
    """Magic and version; a file that is something else is named as what it is."""
    cursor.need(min(8, cursor.size), "the magic")
    magic = bytes(cursor.data[:4])
    if magic != b"GGUF":
        named = {b"PK\x03\x04": "a zip archive", b"vers": "a Git LFS pointer, not the file itself", b"<!DO": "a web page", b"": "empty"}
        named |= dict.fromkeys((b"lmgg", b"tjgg", b"algg", b"fmgg"), "an old llama.cpp format from before GGUF")
        found = named.get(magic, f"not a GGUF file: it begins with {magic!r}")
        cursor.fail(f"this is {found}" if magic in named else found, 0, "take a .gguf file")
    cursor.at = 4
    version = cursor.count("I", "the version")
    if version not in (2, 3):
        order = "big-endian byte order" if version & 0xFFFF == 0 and version else f"version {version}"
        cursor.fail(f"GGUF in {order} is not supported, only versions 2 and 3 in little-endian order", 4, "convert it anew with llama.cpp")
    return version


def read_value(cursor: Cursor, kind: int, key: str) -> Value:
    if kind in NUMBERS:
        return cursor.number(NUMBERS[kind], f"the value of key {key!r}")
    if kind == STRING:
        return cursor.string(MAX_STRING, f"the value of key {key!r}")
    if kind != ARRAY:
        cursor.fail(f"key {key!r} has the unknown type {kind}", cursor.at - 4)
    element_at = cursor.at
    element = cursor.count("I", f"the element type of key {key!r}")
    length = cursor.count("Q", f"the length of key {key!r}")
    if element == STRING:
        return read_strings(cursor, length, key)
    if element not in NUMBERS:
        what = "an array of arrays, which is not supported" if element == ARRAY else f"an array of the unknown type {element}"
        cursor.fail(f"key {key!r} is {what}", element_at)
    return read_numbers(cursor, NUMBERS[element], length, key)


def read_numbers(cursor: Cursor, code: str, length: int, key: str) -> Value:
    """An array of numbers, as compact as in the file (booleans as bytes 0 and 1)."""
    size = struct.calcsize("<" + code) * length
    if size > cursor.size - cursor.at:
        cursor.fail(f"key {key!r} has {length} elements in {size} bytes and {cursor.size - cursor.at} are left")
    cursor.need(size, f"the value of key {key!r}")
    values = array("B" if code == "?" else code)
    values.frombytes(memoryview(cursor.data)[cursor.at : cursor.at + size])
    if code == "?" and length and max(values) > 1:
        cursor.fail(f"key {key!r} has a boolean of value {max(values)}")
    cursor.at += size
    return values


def read_strings(cursor: Cursor, length: int, key: str) -> StringArray:
    """Walk an array of strings, checking each; only their positions are kept."""
    if length * 8 > cursor.size - cursor.at:
        cursor.fail(f"key {key!r} has {length} strings and {cursor.size - cursor.at} bytes are left")
    starts = array("I")
    data, unpack, append = cursor.data, LENGTH.unpack_from, starts.append  # local names: once per token of the vocabulary
    at, have = cursor.at, len(cursor.data)
    apart, one_by_one = 16, 0  # strings to take one by one, more each time that many at once did not work
    while len(starts) < length:
        i = len(starts)
        if i >= one_by_one:
            chain = short_strings(data, at, min(have, at + WINDOW), length - i)
            if len(chain) > 16:
                starts.frombytes(chain.astype(starts.typecode).tobytes())
                at = int(chain[-1]) + 8 + data[chain[-1]]
                continue
            one_by_one, apart = i + apart, 2 * apart
        if at + 8 > have:
            cursor.at = at
            cursor.need(8, f"the length of string {i} of key {key!r}")
            have = len(data)
        (count,) = unpack(data, at)
        append(at)
        at += 8 + count
        if at > have:
            start = at - count
            cursor.at = start
            if count > cursor.size - start:
                cursor.fail(f"string {i} of key {key!r} has {count} bytes and {cursor.size - start} are left", start - 8)
            cursor.need(count, f"string {i} of key {key!r}")
            have = len(data)
    cursor.at = at
    strings = StringArray(data, starts)
    wrong = strings.bad_text()
    if wrong is not None:
        cursor.fail(f"string {wrong[0]} of key {key!r} is not valid UTF-8", wrong[1])
    return strings


def short_strings(data: bytearray, at: int, end: int, most: int) -> np.ndarray:
    """Where strings of 1 to 255 bytes begin that follow each other from `at` on, as far as it is certain that each is one.

    The length of such a string is a byte and seven zeros, which its text has nowhere: so all places that look like a length are
    found at once, and the chain holds as long as each string ends where the next begins.
    """
    window = np.frombuffer(memoryview(data)[at : min(end, at + 264 * most)], dtype=np.uint8)
    if len(window) < 9:
        return np.empty(0, dtype=np.int64)
    zero = window == 0
    run = zero[1:-1] & zero[2:]  # two, four, then seven zeros from a place on
    run = run[:-2] & run[2:]
    places = np.flatnonzero(run[:-3] & run[3:] & ~zero[: len(run) - 3])
    if len(places) == 0 or places[0] != 0:
        return np.empty(0, dtype=np.int64)
    ends = places + 8 + window[places]
    wrong = np.flatnonzero(ends[:-1] != places[1:])
    count = min(most, int(wrong[0]) + 1 if len(wrong) else len(places))
    if ends[count - 1] > len(window):  # its text is not all there yet
        count -= 1
    return places[:count].astype(np.int64) + at


def check_alignment(cursor: Cursor, kind: int, value: Value, at: int) -> int:
    if kind != UINT32 or not isinstance(value, int) or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        cursor.fail(f"general.alignment {value!r} is not a power of two up to {MAX_ALIGNMENT} of type UINT32", at)
    return value


def read_tensors(cursor: Cursor, count: int, alignment: int) -> tuple[dict[str, TensorInfo], int, int]:
    """The table of tensors, checked against the file: -> tensors, alignment, where the data begin."""
    found: dict[str, tuple[TensorInfo, int]] = {}  # with the byte that describes it
    for i in range(count):
        start = cursor.at
        info = read_tensor(cursor, i)
        if info.name in found:
            cursor.fail(f"tensor {info.name!r} occurs twice", start)
        found[info.name] = info, start
    data_offset = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, (info, start) in found.items():
        if info.offset % alignment:
            cursor.fail(f"tensor {name!r} has offset {info.offset}, not a multiple of {alignment}", start)
        begin = data_offset + info.offset
        if begin + info.nbytes > cursor.size:
            cursor.fail(f"tensor {name!r} ends at byte {begin + info.nbytes} and the file has {cursor.size}", start)
        tensors[name] = TensorInfo(name, info.shape, info.type, begin, info.nbytes)
    last: TensorInfo | None = None
    for info in sorted(tensors.values(), key=lambda t: t.offset):
        if last is not None and info.offset < last.offset + last.nbytes:
            cursor.fail(f"tensors {last.name!r} and {info.name!r} overlap", info.offset)
        last = info
    return tensors, alignment, data_offset


def read_tensor(cursor: Cursor, index: int) -> TensorInfo:
    """One row of the table; the offset is still that from the beginning of the data."""
    start = cursor.at
    name = cursor.string(MAX_NAME_BYTES, f"the name of tensor {index}")
    num_dimensions = cursor.count("I", f"the number of dimensions of tensor {name!r}")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        cursor.fail(f"tensor {name!r} has {num_dimensions} dimensions, not 1 to {MAX_DIMENSIONS}", cursor.at - 4)
    lengths = [cursor.count("Q", f"the shape of tensor {name!r}") for _ in range(num_dimensions)]  # columns first
    kind = cursor.count("I", f"the type of tensor {name!r}")
    offset = cursor.count("Q", f"the offset of tensor {name!r}")
    shape = tuple(reversed(lengths))
    weights = prod(lengths)
    if not 0 < weights <= MAX_WEIGHTS:
        cursor.fail(f"tensor {name!r} has the impossible shape {shape}", start)
    if kind not in LAYOUTS:
        cursor.fail(f"tensor {name!r} has the unknown type {kind}", start, "a newer program wrote it: take a Q4_K_M or Q8_0 file")
    layout = LAYOUTS[kind]
    if lengths[0] % layout.block:
        cursor.fail(f"tensor {name!r} has rows of {lengths[0]} weights, which are not whole {layout.name} blocks of {layout.block}", start)
    return TensorInfo(name, shape, kind, offset, weights // layout.block * layout.bytes)
