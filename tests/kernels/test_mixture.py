"""The mixture of experts, the norm alone and rows out of a file's blocks, each against fp64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2 import kernels
from qwen2.kernels.calls import BoundMixture, check, native, norm_rows
from qwen2.kernels.matrix import Matrix
from qwen2.quant import FORMATS
from tests.kernels.conftest import BY_NAME, close_by_row, dense, pack, random_blocks, unit_blocks
from tests.kernels.test_products import NAMES, as_int8

EXPERTS, ACTIVE = 6, 3


class Layer:
    """A small mixture of one format: the packed matrices, and what fp64 makes of the same blocks."""

    def __init__(
        self,
        name: str,
        renormalise: bool,
        experts: int = EXPERTS,
        active: int = ACTIVE,
        sizes: tuple[int, int, int] = (45, 37, 77),
        pack=pack,
    ) -> None:
        self.name, self.renormalise, self.active, self.pack = name, renormalise, active, pack
        self.columns, self.width, self.shared_width = (256, 256, 512) if FORMATS[BY_NAME[name]].block > 1 else sizes
        self.weight = np.full(self.columns, 1.5, np.float32)
        self.router, self.shared_router = self.matrix("F32", experts, self.columns, 1), self.matrix("F32", 1, self.columns, 2)
        self.shared = self.gated(self.shared_width, 10)
        self.experts = [self.gated(self.width, 20 + 3 * i) for i in range(experts)]
        structs = [[matrix.struct for matrix, _ in three] for three in (self.shared, *self.experts)]
        self.bound = BoundMixture(
            self.weight.ctypes.data, 1e-6, self.router[0].struct, self.shared_router[0].struct, structs[0], structs[1:], active, renormalise
        )

    def matrix(self, name: str, rows: int, columns: int, seed: int) -> tuple[Matrix, np.ndarray]:
        blocks = unit_blocks(name, rows, columns, seed)
        return self.pack(name, blocks, rows, columns), dense(name, blocks, rows, columns)

    def gated(self, width: int, seed: int) -> list[tuple[Matrix, np.ndarray]]:
        shapes = [(width, self.columns), (width, self.columns), (self.columns, width)]
        return [self.matrix(self.name, *shape, seed + i) for i, shape in enumerate(shapes)]

    def seen(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) if FORMATS[BY_NAME[self.name]].block == 1 else as_int8(x.astype(np.float32))

    def answer(self, x: np.ndarray, three: list[tuple[Matrix, np.ndarray]]) -> np.ndarray:
        gate, up, down = (numbers for _, numbers in three)
        a, b = self.seen(x) @ gate.T, self.seen(x) @ up.T
        return self.seen((a * (1 + np.tanh(a / 2)) / 2 * b).astype(np.float32)) @ down.T

    def expected(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x after the layer, and the router's logits."""
        normed = (x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * self.weight).astype(np.float32)
        logits = normed.astype(np.float64) @ self.router[1].T
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        out = x + self.answer(normed, self.shared) / (1 + np.exp(-normed.astype(np.float64) @ self.shared_router[1].T))
        for t in range(len(x)):
            chosen = np.argsort(-shares[t], kind="stable")[: self.active]
            total = shares[t, chosen].sum() if self.renormalise else 1.0
            for expert in chosen:
                out[t] += self.answer(normed[t : t + 1], self.experts[expert])[0] * shares[t, expert] / total
        return out, logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("renormalise", [False, True])
def test_the_mixture_equals_fp64(isa: str, name: str, renormalise: bool):
    """One token, some, and so many that experts have a few, some and many tokens; on one thread and two."""
    layer = Layer(name, renormalise)
    for n, threads in ((1, 1), (1, 2), (9, 2), (30, 2), (60, 1), (90, 1), (90, 2)):
        kernels.set_threads(threads)
        x = np.random.default_rng(n).standard_normal((n, layer.columns)).astype(np.float32)
        expected, logits = layer.expected(x)
        found, start = np.empty((n, EXPERTS), np.float32), x.copy()
        layer.bound(x.ctypes.data, n, found.ctypes.data)
        assert np.allclose(found, logits, rtol=1e-5, atol=1e-5), (n, threads)
        assert close_by_row(x, expected, start, exact=FORMATS[BY_NAME[name]].block == 1), (n, threads)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["F32", "BF16", "Q8_0", "Q4_K"]),
    experts=st.integers(1, 9),
    data=st.data(),
    n=st.integers(1, 48),
    renormalise=st.booleans(),
    threads=st.integers(1, 3),
)
def test_any_mixture_equals_fp64_and_a_token_alone(
    isa: str, name: str, experts: int, data: st.DataObject, n: int, renormalise: bool, threads: int
):
    layer = Layer(name, renormalise, experts, data.draw(st.integers(1, experts)))
    kernels.set_threads(threads)
    x = np.random.default_rng(n).standard_normal((n, layer.columns)).astype(np.float32)
    expected, _ = layer.expected(x)
    start, last = x.copy(), x[-1:].copy()
    layer.bound(x.ctypes.data, n, None)
    assert close_by_row(x, expected, start, exact=FORMATS[BY_NAME[name]].block == 1)
    layer.bound(last.ctypes.data, 1, None)
    assert np.array_equal(last[0], x[-1])  # to the bit, whoever else chose its experts


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 63, 64, 65, 896, 3001])
def test_the_norm_equals_fp64(isa: str, columns: int):
    rng = np.random.default_rng(columns)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, columns), columns))
    x[1], x[2] = 0, x[2] * 1e-12
    out = np.empty_like(x)
    norm_rows(x.ctypes.data, 3, columns, weight.ctypes.data, 1e-6, out.ctypes.data)
    wide = x.astype(np.float64)
    assert np.allclose(out, wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_rows_come_out_of_a_files_blocks_to_the_bit(isa: str, name: str):
    rows, columns = 21, 512
    blocks = random_blocks(name, rows, columns, 4)
    order = np.array([20, 0, 7, 7, 13], dtype=np.int64)
    out = np.empty((len(order), columns), np.float32)
    check(native().qwen2_unpack_blocks(BY_NAME[name], columns, blocks.ctypes.data, order.ctypes.data, len(order), out.ctypes.data))
    assert np.array_equal(out.astype(np.float64), dense(name, blocks, rows, columns)[order])


def test_what_the_machine_can_do_is_counted(isa: str):
    """The ceilings' loops say how much they did: every byte once, and two operations a product of every thread."""
    kernels.set_threads(2)
    data = np.zeros(3_000_001, np.uint8)
    assert native().qwen2_read(data.ctypes.data, data.nbytes) == 0
    for function in (native().qwen2_multiply_bytes, native().qwen2_multiply_floats):
        once, twice = (function(rounds) for rounds in (1000, 2000))
        assert 0 < 2 * once == twice
