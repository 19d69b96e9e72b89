"""Weight matrices in the layout of the chosen set of kernels: packed without loss from a file's blocks, row by row readable again.

Left out: where blocks come from (weights/) and what is computed with the result (calls.py).

    matrix = Matrix.empty(12, 4864, 1024, Arena(PIECE)); matrix.pack(blocks)      # ggml type 12 is Q4_K
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import numpy as np

from qwen2.kernels.calls import MatrixStruct, check, native

ALIGNMENT = 64
LARGE_PAGE = 2 << 20
PIECE = 64 << 20  # of an arena for weights


class Matrix:
    """(rows, columns) of one ggml type. `packed` is flat uint8, aligned to 64 bytes; a mapped file may lie behind it."""

    def __init__(self, ggml_type: int, rows: int, columns: int, packed: np.ndarray) -> None:
        size = packed_bytes(ggml_type, rows, columns)
        if packed.nbytes != size:
            raise ValueError(f"a packed matrix ({rows}, {columns}) of ggml type {ggml_type} takes {size} bytes, not {packed.nbytes}")
        assert packed.ctypes.data % ALIGNMENT == 0, "packed matrices begin at multiples of 64 bytes"
        self.packed = packed
        self.struct = MatrixStruct(packed.ctypes.data, None, rows, columns, ggml_type, lanes())
        self._bias: np.ndarray | None = None

    @classmethod
    def empty(cls, ggml_type: int, rows: int, columns: int, arena: Arena) -> Matrix:
        """Memory for a matrix that is then packed piece by piece. Raises ValueError for a type or a width without a kernel."""
        return cls(ggml_type, rows, columns, arena.take(packed_bytes(ggml_type, rows, columns)))

    @property
    def shape(self) -> tuple[int, int]:
        return self.struct.rows, self.struct.columns

    @property
    def type(self) -> int:
        """ggml's number of the format."""
        return int(self.struct.type)

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes)

    def pack(self, blocks: np.ndarray, first: int = 0) -> None:
        """Put whole rows in place, from `first` on, which is a multiple of the lanes; all threads of the pool work."""
        rows, columns = self.shape
        if rows * columns == 0 and blocks.nbytes == 0:
            return
        row_bytes = self.nbytes // max(1, -(-rows // lanes()) * lanes())
        count, rest = divmod(blocks.nbytes, row_bytes) if row_bytes else (rows, 0)
        if rest or first + count > rows or first % lanes():
            raise ValueError(f"{blocks.nbytes} bytes from row {first} on are not whole rows of a matrix ({rows}, {columns})")
        check(native().qwen2_pack(self.type, rows, columns, blocks.ctypes.data, first, count, self.packed.ctypes.data))

    def set_bias(self, bias: np.ndarray) -> None:
        """fp32 (rows,), added to every product."""
        assert bias.dtype == np.float32, f"a bias is fp32, not {bias.dtype}"
        assert bias.shape == (self.struct.rows,), f"a bias has one number a row, not {bias.shape}"
        assert bias.flags.c_contiguous, "a bias lies without gaps"
        self._bias = bias
        self.struct.bias = bias.ctypes.data

    def unpack(self, rows: np.ndarray, out: int) -> None:
        """The numbers of some rows (int64), in fp32, to the address of (len(rows), columns). Row numbers are the caller's to check."""
        check(native().qwen2_unpack_rows(ctypes.addressof(self.struct), rows.ctypes.data, len(rows), out))


def pack_file(file: int, matrices: Sequence[Matrix], offsets: Sequence[int]) -> None:
    """Fill whole matrices from an open file (a descriptor), each from its offset on; all threads of the pool read and pack.

    Raises ValueError where the file has too few bytes or the system gives none.
    """
    structs = (ctypes.c_void_p * len(matrices))(*(ctypes.addressof(matrix.struct) for matrix in matrices))
    places = (ctypes.c_int64 * len(matrices))(*offsets)
    check(native().qwen2_pack_file(file, ctypes.addressof(structs), ctypes.addressof(places), len(matrices)))


def lanes() -> int:
    """Rows that lie interleaved, for the chosen set."""
    return int(native().qwen2_lanes())


def packed_bytes(ggml_type: int, rows: int, columns: int) -> int:
    """Bytes of a packed matrix. ValueError where there is no kernel for the type, or a row is not whole blocks."""
    size = int(native().qwen2_packed_bytes(ggml_type, rows, columns))
    if size < 0:
        raise ValueError(f"there is no kernel for rows of {columns} weights of ggml type {ggml_type}")
    return size


class Arena:
    """Memory cut from large pieces that the system may back with large pages: reading a model in 4 KiB pages costs a fifth more.

    A piece is given back when nothing that was cut from it is in use any more.
    """

    def __init__(self, piece: int) -> None:
        self.piece = piece
        self._rest = np.empty(0, dtype=np.uint8)

    def take(self, size: int) -> np.ndarray:
        """Flat uint8 memory that begins at a multiple of 64 bytes."""
        step = max(1, -(-size // ALIGNMENT)) * ALIGNMENT
        if step > self._rest.nbytes:
            self._rest = large_pages(max(step, self.piece))
        taken, self._rest = self._rest[:size], self._rest[step:]
        return taken


def large_pages(size: int) -> np.ndarray:
    """Fresh memory of at least this size, at a multiple of 2 MiB, for large pages where the system has them."""
    length = -(-size // LARGE_PAGE) * LARGE_PAGE + LARGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux; shared memory, the default, would stay in small pages
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = mmap.mmap(-1, length)
    whole = np.frombuffer(memory, dtype=np.uint8)
    start = -whole.ctypes.data % LARGE_PAGE
    return whole[start : start + -(-size // LARGE_PAGE) * LARGE_PAGE]
