"""Low-rank adapters beside products: against fp64, the same bits in any company, and rows without one as if there were none."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from qwen2 import kernels
from qwen2.kernels.calls import AdditionsStruct, AdditionStruct, BoundFeedForward, BoundProduct
from qwen2.kernels.matrix import Matrix
from tests.kernels.conftest import close_by_row, dense, pack, random_blocks, unit_blocks


class Low:
    """One adapter beside some matrices: A and B as they are packed, and in fp64. None: it leaves that matrix alone."""

    def __init__(self, shapes: Sequence[tuple[int, int] | None], rank: int, seed: int, kind: str = "F32", dora: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.structs, self.dense, self._keep = (AdditionStruct * len(shapes))(), list[Any](), list[Any]()
        for i, shape in enumerate(shapes):
            if shape is None:
                self.dense.append(None)
                continue
            rows, columns = shape
            a, b = (
                random_blocks(kind, rank, columns, seed + 2 * i, 1 / columns**0.5),
                random_blocks(kind, rows, rank, seed + 2 * i + 1, 0.5),
            )
            matrices = pack(kind, a, rank, columns), pack(kind, b, rows, rank)
            share = rng.uniform(0.5, 1.5, rows).astype(np.float32) if dora else None
            self._keep += [*matrices, share]
            places = [ctypes.addressof(matrix.struct) for matrix in matrices]
            self.structs[i] = AdditionStruct(*places, None if share is None else share.ctypes.data, 0.75 + seed % 3)
            self.dense.append((dense(kind, a, rank, columns), dense(kind, b, rows, rank), 0.75 + seed % 3, 1.0 if share is None else share))

    def product(self, i: int, x: np.ndarray, base: np.ndarray) -> np.ndarray:
        if self.dense[i] is None:
            return base
        a, b, scale, share = self.dense[i]
        return share * (base + scale * (x @ a.T @ b.T))


def additions(which: Sequence[int], adapters: Sequence[Low]) -> AdditionsStruct:
    rows = (ctypes.c_int32 * len(which))(*which)
    places = (ctypes.c_void_p * len(adapters))(*(ctypes.addressof(one.structs) for one in adapters))
    struct = AdditionsStruct(ctypes.addressof(rows), ctypes.addressof(places), len(adapters), 0)
    struct.keep = (rows, places, list(adapters))
    return struct


def adapted(
    matrices: list[Matrix], x: np.ndarray, which: Sequence[int], adapters: Sequence[Low], add_to: np.ndarray | None = None
) -> np.ndarray:
    bound = BoundProduct([matrix.struct for matrix in matrices], add=add_to is not None)
    out = np.full((len(x), bound.width), np.nan, np.float32) if add_to is None else add_to.copy()
    rows = np.ascontiguousarray(x, np.float32)
    struct = additions(which, adapters)
    bound(rows.ctypes.data, len(rows), out.ctypes.data, ctypes.addressof(struct))
    return out


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("rank", [1, 8, 16, 33, 70])
def test_adapted_products_equal_fp64(isa: str, kind: str, rank: int):
    """Two matrices, biases, three adapters of unlike ranks among 29 rows, one with row factors, one that leaves a matrix alone."""
    shapes = [(75, 96), (40, 96)]
    blocks = [random_blocks("F32", *shape, i) for i, shape in enumerate(shapes)]
    matrices = [pack("F32", data, *shape) for data, shape in zip(blocks, shapes, strict=True)]
    rng = np.random.default_rng(rank)
    biases = [rng.standard_normal(rows).astype(np.float32) for rows, _ in shapes]
    for matrix, bias in zip(matrices, biases, strict=True):
        matrix.set_bias(bias)
    adapters = [Low(shapes, rank, 1, kind), Low(shapes, 3, 5, kind, dora=True), Low([None, shapes[1]], rank, 9, kind)]
    x, which = rng.standard_normal((29, 96)).astype(np.float32), rng.integers(-1, 3, 29)
    start = rng.standard_normal((29, 115)).astype(np.float32)
    parts = []
    for i, (data, shape, bias) in enumerate(zip(blocks, shapes, biases, strict=True)):
        base = x @ dense("F32", data, *shape).T
        rows = [base[t] if g < 0 else adapters[g].product(i, x[t].astype(np.float64), base[t]) for t, g in enumerate(which)]
        parts.append(np.stack(rows) + bias)
    expected = np.concatenate(parts, axis=1)
    assert np.allclose(adapted(matrices, x, which, adapters), expected, rtol=1e-4, atol=2e-5)
    assert np.allclose(adapted(matrices, x, which, adapters, start), start + expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "BF16"])
def test_a_row_has_the_same_bits_in_any_company(isa: str, name: str):
    """Alone or among rows of other adapters and of none; those of none have the bits of a product without adapters."""
    rows, columns = 67, 768
    matrix = pack(name, random_blocks(name, rows, columns, 1), rows, columns)
    adapters = [Low([(rows, columns)], 16, 1), Low([(rows, columns)], 40, 2, "BF16", dora=True), Low([None], 4, 3)]
    x = np.random.default_rng(2).standard_normal((130, columns)).astype(np.float32)
    which = np.random.default_rng(3).integers(-1, 3, 130)
    kernels.set_threads(1)
    alone = np.concatenate([adapted([matrix], x[t : t + 1], [0] if g >= 0 else [-1], [adapters[g]]) for t, g in enumerate(which)])
    base = np.concatenate([adapted([matrix], x[t : t + 1], [-1], adapters) for t in range(130)])
    bare = np.full_like(base, np.nan)
    BoundProduct([matrix.struct])(x.ctypes.data, 130, bare.ctypes.data)
    assert np.array_equal(base, bare)
    assert np.array_equal(alone[(which < 0) | (which == 2)], bare[(which < 0) | (which == 2)])
    assert (alone[which == 0] != bare[which == 0]).any(axis=1).all()
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        for n in (2, 3, 7, 12, 13, 24, 25, 26, 31, 48, 130):
            assert np.array_equal(adapted([matrix], x[:n], which[:n], adapters), alone[:n]), (threads, n)
            assert np.array_equal(adapted([matrix], x[-n:], which[-n:], adapters), alone[-n:]), (threads, n)
        order = np.argsort(which, kind="stable")
        assert np.array_equal(adapted([matrix], x[order], which[order], adapters), alone[order])
        assert np.array_equal(adapted([matrix], x, np.where(which < 0, -1, 2 - which), adapters[::-1]), alone)


@pytest.mark.parametrize("name", ["Q8_0", "F32"])
def test_the_feed_forward_part_with_adapters(isa: str, name: str):
    """Gate, up and down each with an addition, against fp64; rows without one as they are without adapters."""
    width, columns = 160, 96
    shapes = [(width, columns), (width, columns), (columns, width)]
    blocks = [unit_blocks(name, *shape, i) for i, shape in enumerate(shapes)]
    gate, up, down = (pack(name, data, *shape) for data, shape in zip(blocks, shapes, strict=True))
    wide = [dense(name, data, *shape) for data, shape in zip(blocks, shapes, strict=True)]
    norm = np.ones(columns, np.float32)
    adapters = [Low(shapes, 8, 1), Low([shapes[0], None, shapes[2]], 16, 4, dora=True)]
    x = np.random.default_rng(0).standard_normal((11, columns)).astype(np.float32)
    which = [0, -1, 1, 1, 0, -1, 0, 1, 1, 1, 0]
    bound = BoundFeedForward(norm.ctypes.data, 1e-6, gate.struct, up.struct, down.struct)
    struct = additions(which, adapters)
    found, bare = x.copy(), x.copy()
    bound(found.ctypes.data, len(x), ctypes.addressof(struct))
    bound(bare.ctypes.data, len(x))
    expected = x.astype(np.float64)
    for t, g in enumerate(which):
        y = x[t] / np.sqrt((x[t].astype(np.float64) ** 2).mean() + 1e-6)
        part = [y @ w.T for w in wide[:2]]
        if g >= 0:
            part = [adapters[g].product(i, y, part[i]) for i in range(2)]
        h = part[0] / (1 + np.exp(-part[0])) * part[1]
        expected[t] += h @ wide[2].T if g < 0 else adapters[g].product(2, h, h @ wide[2].T)
    plain = [t for t, g in enumerate(which) if g < 0]
    assert np.array_equal(found[plain], bare[plain])
    assert close_by_row(found, expected, x, exact=name == "F32")


def test_additions_that_do_not_fit_are_refused(isa: str):
    matrix = pack("F32", random_blocks("F32", 8, 32, 0), 8, 32)
    x = np.ones((2, 32), np.float32)
    for shape in ((8, 64), (16, 32)):
        with pytest.raises(ValueError, match="do not fit"):
            adapted([matrix], x, [0, -1], [Low([shape], 4, 0)])
    assert np.array_equal(adapted([matrix], x, [-1, -1], [Low([(16, 32)], 4, 0)])[0], adapted([matrix], x, [-1, -1], [])[0])
