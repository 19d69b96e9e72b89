"""No byte outside a matrix, its input or its output is touched: each lies flush against a page that may not be read."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest

from qwen2 import kernels
from qwen2.kernels.calls import BoundFeedForward, BoundProduct
from qwen2.kernels.matrix import ALIGNMENT, Matrix, packed_bytes
from qwen2.quant import FORMATS
from tests.kernels.conftest import BY_NAME, dense, random_blocks, unit_blocks
from tests.kernels.test_attention import Sequence, attend, random_qkv
from tests.kernels.test_mixture import Layer

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


def guarded(array: np.ndarray) -> np.ndarray:
    """The same array at the end of guarded memory."""
    copy = Guarded(array.nbytes).bytes.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def guarded_pack(name: str, blocks: np.ndarray, rows: int, columns: int) -> Matrix:
    matrix = Matrix(BY_NAME[name], rows, columns, Guarded(packed_bytes(BY_NAME[name], rows, columns)).bytes)
    matrix.pack(guarded(blocks))
    return matrix


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(14, 2, 64), (4, 1, 24), (2, 2, 2), (3, 3, 18), (4, 1, 80), (4, 2, 256)])
def test_attention_stays_within_its_memory(isa: str, heads: int, kv_heads: int, d: int, bits: int):
    """A prompt, then some tokens of it and of a second sequence; with factors of the keys; blocks of the cache end at a page too."""
    first, second = (Sequence(kv_heads, d, bits, guarded) for _ in range(2))
    factors = guarded(np.ones((kv_heads, d // 2), np.float32))
    for lengths in ((67, 1), (1, 3), (5, 61)):
        pieces = [random_qkv(heads, kv_heads, d, n, n) for n in lengths]
        assert np.isfinite(attend([first, second], pieces, heads, kv_heads, d, bits, factors, guarded)).all()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_K", "Q6_K"])
def test_the_feed_forward_part_stays_within_its_memory(isa: str, name: str):
    columns, width = (256, 512) if FORMATS[BY_NAME[name]].block > 1 else (64, 96)
    shapes = ((width, columns), (width, columns), (columns, width))
    gate, up, down = (guarded_pack(name, unit_blocks(name, *shape, i), *shape) for i, shape in enumerate(shapes))
    weight = guarded(np.ones(columns, np.float32))
    part = BoundFeedForward(weight.ctypes.data, 1e-6, gate.struct, up.struct, down.struct)
    for n in (1, 2, 9, 25, 41):
        x = guarded(np.random.default_rng(n).standard_normal((n, columns)).astype(np.float32))
        part(x.ctypes.data, n)
        assert np.isfinite(x).all()


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "Q4_K"])
def test_the_mixture_stays_within_its_memory(isa: str, name: str):
    layer = Layer(name, False, experts=5, sizes=(64, 96, 32), pack=guarded_pack)
    for n in (1, 2, 13, 45):
        x, logits = (guarded(np.random.default_rng(n).standard_normal(shape).astype(np.float32)) for shape in ((n, layer.columns), (n, 5)))
        layer.bound(x.ctypes.data, n, logits.ctypes.data)
        assert np.isfinite(x).all()


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
