"""Fixtures of the kernels' tests: each instruction set that this processor has in turn, and random blocks of every format."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from qwen2 import kernels
from qwen2.kernels.calls import BoundProduct
from qwen2.kernels.matrix import Arena, Matrix
from qwen2.quant import FORMATS, dequantize

NEEDS = {"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512vnni"}, "avx2": {"avx2", "fma", "f16c"}, "neon": {"neon", "dotprod"}}
HALVES = {  # where the fp16 numbers of a block lie
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
BY_NAME = {form.name: number for number, form in FORMATS.items()}


def sets_here() -> list[str]:
    return [name for name in kernels.SETS if NEEDS[name] <= kernels.features()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", sets_here(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """One set of kernels, then the best again."""
    kernels.select_isa(request.param)
    yield request.param
    kernels.select_isa(None)
    kernels.set_threads(1)


def random_blocks(name: str, rows: int, columns: int, seed: int, scale: float = 0.1) -> np.ndarray:
    """Blocks (bytes) whose integers are uniform and whose fp16 numbers lie within `scale`."""
    rng, form = np.random.default_rng(seed), FORMATS[BY_NAME[name]]
    count = rows * columns // form.block
    if form.block == 1:
        numbers = (rng.standard_normal(count) * scale).astype(np.float32)
        if name == "BF16":
            return np.ascontiguousarray(numbers.view(np.uint16)[1::2]).view(np.uint8)
        return numbers.astype(np.float16 if name == "F16" else np.float32).view(np.uint8)
    blocks = rng.integers(0, 256, (count, form.bytes), dtype=np.uint8)
    for at in HALVES[name]:
        blocks[:, at : at + 2] = rng.uniform(-scale, scale, count).astype(np.float16).view(np.uint8).reshape(count, 2)
    return blocks.reshape(-1)


def unit_blocks(name: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random blocks whose products with numbers near 1 are near 1."""
    size = dense(name, random_blocks(name, rows, columns, seed, 0.1), rows, columns).std()
    return random_blocks(name, rows, columns, seed, 0.1 / (size * columns**0.5))


def pack(name: str, blocks: np.ndarray, rows: int, columns: int) -> Matrix:
    matrix = Matrix.empty(BY_NAME[name], rows, columns, Arena(1 << 16))
    matrix.pack(blocks)
    return matrix


def dense(name: str, blocks: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """What the blocks mean, in fp64."""
    return dequantize(blocks, BY_NAME[name], (rows, columns)).double().numpy()


def multiply(matrices: list[Matrix], x: np.ndarray, add_to: np.ndarray | None = None, norm: np.ndarray | None = None) -> np.ndarray:
    """x (n, columns) through the kernels: (n, rows of all matrices side by side)."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bound = BoundProduct([matrix.struct for matrix in matrices], None if norm is None else norm.ctypes.data, 1e-6, add_to is not None)
    out = np.full((len(x), bound.width), np.nan, np.float32) if add_to is None else add_to.copy()
    bound(x.ctypes.data, len(x), out.ctypes.data)
    return out


def close_by_row(x: np.ndarray, expected: np.ndarray, start: np.ndarray, exact: bool) -> bool:
    """x against `expected`, by the largest change of each row since `start`: tight where nothing was rounded to int8 on the way.

    Where something was, an integer may be rounded the other way in fp32 than in the oracle.
    """
    change = np.abs(expected - start).max(-1, keepdims=True)
    return bool((change > 0.05).all() and (np.abs(x - expected) <= (1e-5 if exact else 0.02) * change + 1e-6 * np.abs(start)).all())
