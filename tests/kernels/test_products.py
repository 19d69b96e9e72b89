"""Products of packed matrices against fp64: every format, every instruction set of this processor, odd shapes, hostile numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2 import kernels
from qwen2.kernels.calls import BoundFeedForward, argmax_rows
from qwen2.kernels.matrix import Arena, Matrix, pack_file, packed_bytes
from qwen2.quant import FORMATS
from tests.kernels.conftest import BY_NAME, HALVES, close_by_row, dense, multiply, pack, random_blocks, sets_here, unit_blocks

NAMES = list(BY_NAME)
SCALES = {"Q3_K": (96, 108), "Q6_K": (192, 208)}  # where the scales of a block's halves lie
EXTREMES = {"Q3_K": (0x00, 0xFF), "Q6_K": (0x80, 0x7F)}  # bytes that make these scales as large as they can be, of either sign
relaxed = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_int8(x: np.ndarray) -> np.ndarray:
    """What the kernels make of activations: groups of 32, integers up to 127 times a scale; in fp64."""
    groups = x.reshape(len(x), x.shape[1] // 32, 32)
    highest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), highest, out=np.zeros_like(highest), where=highest > 0)
    return (np.rint(groups * inverse).astype(np.float64) * (highest * np.float32(1 / 127))).reshape(x.shape)


def oracle(name: str, blocks: np.ndarray, rows: int, columns: int, x: np.ndarray) -> np.ndarray:
    seen = x.astype(np.float64) if FORMATS[BY_NAME[name]].block == 1 else as_int8(x)
    return seen @ dense(name, blocks, rows, columns).T


def close(found: np.ndarray, expected: np.ndarray, weights: np.ndarray, x: np.ndarray) -> bool:
    """Within what adding up in fp32 may lose: a fraction of the sum of magnitudes."""
    bound = np.abs(x).astype(np.float64) @ np.abs(weights).T
    return bool((np.abs(found - expected) <= 2e-6 * bound + 1e-30).all())


@pytest.mark.parametrize("name", NAMES)
@relaxed
@given(
    rows=st.integers(0, 83),
    units=st.integers(0, 5),
    n=st.integers(0, 40),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-4, 0.1, 300.0]),
)
def test_products_equal_fp64(isa: str, name: str, rows: int, units: int, n: int, seed: int, scale: float):
    form = FORMATS[BY_NAME[name]]
    columns = units * form.block if form.block > 1 else 13 * units
    blocks = random_blocks(name, rows, columns, seed, scale)
    x = np.random.default_rng(seed).standard_normal((n, columns)).astype(np.float32)
    found = multiply([pack(name, blocks, rows, columns)], x)
    weights = dense(name, blocks, rows, columns)
    assert close(found, oracle(name, blocks, rows, columns, x), weights, x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 3, 8, 16, 33])
def test_wide_products_equal_fp64(isa: str, name: str, n: int):
    """Rows of 76 groups, several chunks of those that are expanded together and a rest, and more rows than one panel of tiles."""
    form, rows = FORMATS[BY_NAME[name]], 200
    columns = 2560 if form.block == 256 else 2432 if form.block > 1 else 2431
    blocks = random_blocks(name, rows, columns, n)
    x = np.random.default_rng(n).standard_normal((n, columns)).astype(np.float32)
    weights = dense(name, blocks, rows, columns)
    assert close(multiply([pack(name, blocks, rows, columns)], x), oracle(name, blocks, rows, columns, x), weights, x)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_same_bits_in_any_company(isa: str, name: str):
    """Alone, among 2 to 130 rows, and for any number of threads: the promise that batches and split prompts rest on."""
    form, rows = FORMATS[BY_NAME[name]], 67
    columns = 768 if form.block > 1 else 700  # 24 groups: a chunk and a half of those that are expanded together
    matrix = pack(name, random_blocks(name, rows, columns, 1), rows, columns)
    x = np.random.default_rng(2).standard_normal((130, columns)).astype(np.float32)
    kernels.set_threads(1)
    alone = np.concatenate([multiply([matrix], x[i : i + 1]) for i in range(len(x))])
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        for n in (2, 3, 4, 5, 7, 8, 9, 15, 16, 24, 25, 26, 31, 39, 40, 41, 48, 70, 130):
            assert np.array_equal(multiply([matrix], x[:n]), alone[:n]), (threads, n)
            assert np.array_equal(multiply([matrix], x[-n:]), alone[-n:]), (threads, n)


@pytest.mark.parametrize("name", NAMES)
def test_rows_come_back_to_the_bit(isa: str, name: str):
    columns, rows = (512, 37) if FORMATS[BY_NAME[name]].block > 1 else (45, 37)
    blocks = random_blocks(name, rows, columns, 3)
    matrix = pack(name, blocks, rows, columns)
    numbers = np.random.default_rng(0).integers(0, rows, 50)
    for order in (numbers, np.arange(rows), np.concatenate([numbers[:5], np.arange(3, rows), np.arange(rows)])):  # whole tiles at once
        out = np.empty((len(order), columns), np.float32)
        matrix.unpack(order, out.ctypes.data)
        assert np.array_equal(out.astype(np.float64), dense(name, blocks, rows, columns)[order])


def test_whole_matrices_come_out_of_a_file_as_they_come_out_of_memory(isa: str, tmp_path: Path):
    """Every format, one matrix larger than a thread reads at a time, rows that fill no tile; a file that is too short says so."""
    shapes = [(name, 83, 512, i) for i, name in enumerate(NAMES)] + [("Q8_0", 1500, 1024, 99), ("F32", 1, 256, 100)]
    blocks = [random_blocks(*shape) for shape in shapes]
    offsets = [int(at) for at in np.cumsum([7, *(len(data) + 3 for data in blocks)])]
    path = tmp_path / "blocks"
    path.write_bytes(b"." * 7 + b"".join(data.tobytes() + b"..." for data in blocks))
    kernels.set_threads(2)
    matrices = [Matrix.empty(BY_NAME[name], rows, columns, Arena(1 << 16)) for name, rows, columns, _ in shapes]
    with path.open("rb") as file:
        pack_file(file.fileno(), matrices, offsets[: len(shapes)])
    for (name, rows, columns, _), data, matrix in zip(shapes, blocks, matrices, strict=True):
        assert np.array_equal(matrix.packed, pack(name, data, rows, columns).packed), name
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)
        with pytest.raises(ValueError, match="the file ended before its last matrix"):
            pack_file(file.fileno(), matrices, offsets[: len(shapes)])


def test_a_packed_matrix_takes_no_more_bytes_than_its_blocks(isa: str):
    for name in NAMES:
        form = FORMATS[BY_NAME[name]]
        assert packed_bytes(BY_NAME[name], 64, 512) == form.size(64 * 512)


def test_several_matrices_of_different_formats_share_one_input(isa: str):
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    names, rows = ("Q5_0", "Q8_0", "F32", "Q4_K"), (40, 7, 33, 16)
    blocks = [random_blocks(name, r, 256, i) for i, (name, r) in enumerate(zip(names, rows, strict=True))]
    matrices = [pack(name, b, r, 256) for name, b, r in zip(names, blocks, rows, strict=True)]
    together = multiply(matrices, x)
    assert np.array_equal(together, np.concatenate([multiply([matrix], x) for matrix in matrices], axis=1))
    start = np.ones_like(together)
    assert np.array_equal(multiply(matrices, x, add_to=start), start + together)


def test_norm_bias_and_sum_are_part_of_the_product(isa: str):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((5, 96)).astype(np.float32), rng.standard_normal(96).astype(np.float32)
    blocks = random_blocks("F32", 20, 96, 0)
    matrix, bias = pack("F32", blocks, 20, 96), rng.standard_normal(20).astype(np.float32)
    matrix.set_bias(bias)
    wide = x.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight
    expected = normed @ dense("F32", blocks, 20, 96).T + bias
    assert np.allclose(multiply([matrix], x, norm=weight), expected, rtol=1e-5, atol=1e-5)
    assert np.allclose(multiply([matrix], x, norm=weight, add_to=np.full((5, 20), 2, np.float32)), expected + 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 40])
def test_what_is_not_a_number_never_becomes_one(isa: str, name: str, bad: float, n: int):
    """The outputs of a row that holds NaN or infinity are not finite, and no other row notices."""
    columns = 256 if FORMATS[BY_NAME[name]].block > 1 else 40
    matrix = pack(name, random_blocks(name, 32, columns, 0), 32, columns)
    x = np.random.default_rng(0).standard_normal((n, columns)).astype(np.float32)
    clean = multiply([matrix], x)
    x[n // 2, 17] = bad
    found = multiply([matrix], x)
    assert not np.isfinite(found[n // 2]).any()
    assert np.array_equal(np.delete(found, n // 2, 0), np.delete(clean, n // 2, 0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-42, 1e-36, 1e-30, 1e30])
def test_extreme_activations(isa: str, name: str, size: float):
    columns = 256 if FORMATS[BY_NAME[name]].block > 1 else 40
    blocks = random_blocks(name, 16, columns, 0)
    x = (np.random.default_rng(0).standard_normal((2, columns)) * size).astype(np.float32)
    found = multiply([pack(name, blocks, 16, columns)], x).astype(np.float64)
    weights = dense(name, blocks, 16, columns)
    exact = x.astype(np.float64) @ weights.T
    assert np.isfinite(found).all()
    nothing = 1e-35 * np.abs(weights).sum(1).max()  # a group whose largest number is below 1e-35 counts as zeros
    assert np.abs(found - exact).max() <= 0.02 * np.abs(exact).max() + nothing


@pytest.mark.parametrize("name", [name for name in NAMES if FORMATS[BY_NAME[name]].block > 1])
def test_sums_at_their_largest_do_not_overflow(isa: str, name: str):
    """Every quant at its end and every activation at 127 or -127 of one sign: what sums in 16 bits have to hold on AVX2."""
    columns = 512
    for byte, scales in [(byte, None) for byte in (0xFF, 0x00, 0x7F, 0x80)] + [
        (q, s) for q in (0xFF, 0x00) for s in EXTREMES.get(name, ())
    ]:
        blocks = random_blocks(name, 32, columns, 5)
        whole = blocks.reshape(-1, FORMATS[BY_NAME[name]].bytes)
        halves = np.concatenate([np.arange(at, at + 2) for at in HALVES[name]])
        others = np.setdiff1d(np.arange(whole.shape[1]), halves)
        whole[:, others] = byte
        if scales is not None:
            whole[:, slice(*SCALES[name])] = scales
        for sign in (1.0, -1.0):
            for n in (1, 3, 8, 16, 25, 40):
                x = np.full((n, columns), sign, dtype=np.float32)
                found = multiply([pack(name, blocks, 32, columns)], x)
                assert close(found, oracle(name, blocks, 32, columns, x), dense(name, blocks, 32, columns), x), (byte, sign, n)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_nothing(isa: str, name: str):
    columns = 256 if FORMATS[BY_NAME[name]].block > 1 else 40
    matrix = pack(name, random_blocks(name, 16, columns, 0), 16, columns)
    assert not multiply([matrix], np.zeros((3, columns), np.float32)).any()
    assert multiply([matrix], np.zeros((0, columns), np.float32)).shape == (0, 16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 5, 40])
def test_the_feed_forward_part_equals_fp64(isa: str, name: str, n: int):
    columns, width = (256, 512) if FORMATS[BY_NAME[name]].block > 1 else (45, 77)
    shapes = [(width, columns), (width, columns), (columns, width)]
    blocks = [unit_blocks(name, *shape, seed) for seed, shape in enumerate(shapes)]
    gate, up, down = (pack(name, b, *shape) for b, shape in zip(blocks, shapes, strict=True))
    x, weight = np.random.default_rng(n).standard_normal((n, columns)).astype(np.float32), np.full(columns, 1.5, np.float32)
    normed = (x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * weight).astype(np.float32)
    a, b = (oracle(name, blocks[i], width, columns, normed) for i in (0, 1))
    expected = x + oracle(name, blocks[2], columns, width, (a * (1 + np.tanh(a / 2)) / 2 * b).astype(np.float32))
    start = x.copy()
    BoundFeedForward(weight.ctypes.data, 1e-6, gate.struct, up.struct, down.struct)(x.ctypes.data, n)
    assert close_by_row(x, expected, start, exact=FORMATS[BY_NAME[name]].block == 1)


def test_the_largest_of_a_row_is_found_at_its_first_place(isa: str):
    rng = np.random.default_rng(0)
    for columns in (1, 3, 4, 17, 64, 257, 1025, 3000):
        x = np.ascontiguousarray(rng.integers(-9, 9, (6, columns)), dtype=np.float32)  # many equals
        x[1], x[2, -1], x[3, columns // 2], x[4] = -np.inf, np.inf, np.nan, np.maximum(x[4], 0)
        places, values = argmax_rows(x.ctypes.data, *x.shape, columns)
        assert places == x.argmax(-1).tolist()
        assert np.array_equal(np.float32(values), x.max(-1), equal_nan=True)


def test_what_does_not_fit_is_refused(isa: str):
    with pytest.raises(ValueError, match=r"^there is no kernel for rows of 48 weights of ggml type 2$"):
        packed_bytes(2, 16, 48)
    with pytest.raises(ValueError, match=r"^there is no kernel for rows of 256 weights of ggml type 16$"):
        packed_bytes(16, 16, 256)
    blocks = random_blocks("Q4_0", 16, 64, 0)
    for wrong in (blocks[:-1], blocks[:35], np.concatenate([blocks, blocks])):
        with pytest.raises(ValueError, match=rf"^{wrong.nbytes} bytes from row 0 on are not whole rows of a matrix \(16, 64\)$"):
            pack("Q4_0", wrong, 16, 64)
    a, b = pack("Q4_0", blocks, 16, 64), pack("Q4_0", random_blocks("Q4_0", 16, 32, 0), 16, 32)
    with pytest.raises(ValueError, match=r"^kernel: matrices that do not fit each other"):
        multiply([a, b], np.zeros((1, 64), np.float32))


def test_matrices_run_by_the_set_they_were_packed_for_whatever_is_chosen_later():
    """Bit for bit; those of two sets do not fit into one product, and those of no set are refused: their rows would be mixed up."""
    sets = sets_here()
    if len(sets) < 2:
        pytest.skip("this processor has one set of kernels")
    blocks, x = random_blocks("Q4_0", 16, 64, 0), np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    norm, rows = np.full(64, 1.5, np.float32), np.arange(16)
    try:
        packed, expected = {}, {}
        for name in sets:
            kernels.select_isa(name)
            packed[name] = pack("Q4_0", blocks, 16, 64)
            expected[name] = multiply([packed[name]], x, norm=norm)
            assert packed[name].struct.lanes == kernels.LANES[name]
        for chosen in (*sets, "none"):
            kernels.select_isa(chosen)
            for name in sets:
                assert np.array_equal(multiply([packed[name]], x, norm=norm), expected[name])
                out = np.empty((16, 64), np.float32)
                packed[name].unpack(rows, out.ctypes.data)
                assert np.array_equal(out, dense("Q4_0", blocks, 16, 64))
            with pytest.raises(ValueError, match="packed for another instruction set"):
                multiply([packed[name] for name in sets], x)
        packed[sets[0]].struct.lanes = 5
        with pytest.raises(ValueError, match="packed for another instruction set"):
            multiply([packed[sets[0]]], x)
    finally:
        kernels.select_isa(None)
