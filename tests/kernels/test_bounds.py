"""No byte outside a matrix, its input or its output is touched: each lies flush against a page that may not be read."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest

from qwen2 import kernels
from qwen2.kernels.calls import BoundProduct
from qwen2.kernels.matrix import ALIGNMENT, Matrix, packed_bytes
from qwen2.quant import FORMATS
from tests.kernels.conftest import BY_NAME, dense, random_blocks

PAGE = mmap.PAGESIZE
NO_ACCESS = 0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are protected as Linux does it")


class Guarded:
    """Memory that ends where reading ends in a fault."""

    def __init__(self, size: int) -> None:
        pages = -(-max(size, 1) // PAGE) + 1
        self.memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = np.frombuffer(self.memory, dtype=np.uint8)
        end = (pages - 1) * PAGE
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert protect(whole.ctypes.data + end, PAGE, NO_ACCESS) == 0, ctypes.get_errno()
        self.bytes = whole[end - size : end]

    def floats(self, *shape: int) -> np.ndarray:
        return self.bytes.view(np.float32).reshape(shape)


@pytest.mark.parametrize("name", list(BY_NAME))
def test_products_and_unpacking_stay_within_their_memory(isa: str, name: str):
    block = FORMATS[BY_NAME[name]].block
    for rows in (1, 7, 8, 9, 16, 24, 31, 32, 33, 40, 56, 67):
        for columns in (256, 768) if block == 256 else (32, 544, 1056) if block == 32 else (13, 64):
            size = packed_bytes(BY_NAME[name], rows, columns)
            if size % ALIGNMENT:  # cannot both begin where matrices do and end at a page
                continue
            blocks = random_blocks(name, rows, columns, rows)
            place = Guarded(size)
            matrix = Matrix(BY_NAME[name], rows, columns, place.bytes)
            matrix.pack(blocks)
            product = BoundProduct([matrix.struct])
            for n in (1, 2, 8, 9, 25, 41):
                x, out = Guarded(4 * n * columns), Guarded(4 * n * rows)
                x.floats(n, columns)[:] = np.random.default_rng(n).standard_normal((n, columns))
                product(x.bytes.ctypes.data, n, out.bytes.ctypes.data)
                assert np.isfinite(out.floats(n, rows)).all()
            numbers, back = np.arange(rows), Guarded(4 * rows * columns)
            matrix.unpack(numbers, back.bytes.ctypes.data)
            assert np.array_equal(back.floats(rows, columns), dense(name, blocks, rows, columns).astype(np.float32))
    kernels.set_threads(1)
