"""Attention over blocks of the cache, against fp64, and bit for bit between all the ways in which a sequence can be cut."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2 import kernels
from qwen2.kernels.calls import AttentionStruct, check, native

SHAPES = {  # heads, kv heads, head size, tokens
    "0.5b": (14, 2, 64, 300), "1.5b": (12, 2, 128, 150), "tiny": (4, 2, 16, 200), "odd": (4, 1, 24, 70), "least": (2, 2, 2, 70),
    "eighty": (16, 2, 80, 90), "widest": (4, 4, 256, 80), "several spans": (14, 2, 64, 2300),
}  # fmt: skip
Place = Callable[[np.ndarray], np.ndarray]  # memory of a kind that a test wants, with the same content
TOLERANCE = {16: 6e-4, 8: 2.5e-2}  # of the largest output; values of 8 bits are off by 1/254 of a token's largest

ANY_SHAPE = {16: 2e-3, 8: 0.1}  # the same where a head has few dimensions, so that a score hangs on two rounded numbers


class Sequence:
    """Blocks for one sequence and one layer, with rubbish where nothing was written: NaN as scales, -1 as integers."""

    def __init__(self, kv_heads: int, head_dim: int, bits: int, place: Place = np.asarray) -> None:
        self.length, self.blocks, self.place = 0, [], place
        self.size = kv_heads * int(native().qwen2_cache_bytes(head_dim, bits))

    def reserve(self, total: int) -> None:
        while len(self.blocks) * 64 < total:
            self.blocks.append(self.place(np.full(self.size, 255, np.uint8)))


def attend(
    sequences: list[Sequence],
    pieces: list[np.ndarray],
    heads: int,
    kv_heads: int,
    head_dim: int,
    bits: int,
    factors: np.ndarray | None = None,
    place: Place = np.asarray,
) -> np.ndarray:
    """New tokens' q, k and v (n, (H + 2K) * d) of each sequence -> (N, H * d); `factors` (K, d / 2) of the keys' pairs."""
    qkv = place(np.ascontiguousarray(np.concatenate(pieces), dtype=np.float32))
    out = place(np.full((len(qkv), heads * head_dim), np.nan, np.float32))
    positions = np.concatenate([np.arange(s.length, s.length + len(x)) for s, x in zip(sequences, pieces, strict=True)])
    cos, sin = (place(np.ascontiguousarray(t, dtype=np.float32)) for t in angles(positions, head_dim))
    for sequence, piece in zip(sequences, pieces, strict=True):
        sequence.reserve(sequence.length + len(piece))
    used = [b.ctypes.data for s, x in zip(sequences, pieces, strict=True) for b in s.blocks[: -(-(s.length + len(x)) // 64)]]
    blocks = place(np.array(used, np.uint64))
    counts, histories = (place(np.array(values, np.int32)) for values in ([len(x) for x in pieces], [s.length for s in sequences]))
    step = AttentionStruct(
        *(array.ctypes.data for array in (qkv, out, cos, sin, counts, histories, blocks)),
        None if factors is None else factors.ctypes.data, qkv.shape[1], out.shape[1], 0, len(pieces), heads, kv_heads, head_dim, bits, 0,
    )  # fmt: skip
    check(native().qwen2_attend(ctypes.addressof(step)))
    for sequence, piece in zip(sequences, pieces, strict=True):
        sequence.length += len(piece)
    return out


def angles(positions: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    turns = positions[:, None] / 1e6 ** (np.arange(0, head_dim, 2) / head_dim)
    return np.cos(turns), np.sin(turns)


def oracle(qkv: np.ndarray, heads: int, kv_heads: int, d: int) -> np.ndarray:
    """One sequence from its beginning, in fp64."""
    x, n = qkv.astype(np.float64), len(qkv)
    cos, sin = (table[:, None] for table in angles(np.arange(n), d))

    def rotated(y: np.ndarray) -> np.ndarray:
        a, b = y[..., : d // 2], y[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    q = rotated(x[:, : heads * d].reshape(n, heads, d))
    k = rotated(x[:, heads * d : (heads + kv_heads) * d].reshape(n, kv_heads, d)).repeat(heads // kv_heads, 1)
    v = x[:, (heads + kv_heads) * d :].reshape(n, kv_heads, d).repeat(heads // kv_heads, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d)
    scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v).reshape(n, heads * d)


def random_qkv(heads: int, kv_heads: int, d: int, n: int, seed: int = 0, bias: float = 3.0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, (heads + 2 * kv_heads) * d)).astype(np.float32)
    x[:, heads * d : (heads + kv_heads) * d] += bias
    return x


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_fp64(isa: str, name: str, bits: int):
    heads, kv_heads, d, n = SHAPES[name]
    x = random_qkv(heads, kv_heads, d, n)
    kernels.set_threads(2)
    found, expected = attend([Sequence(kv_heads, d, bits)], [x], heads, kv_heads, d, bits), oracle(x, heads, kv_heads, d)
    assert np.abs(found - expected).max() <= TOLERANCE[bits] * np.abs(expected).max()


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_a_token_has_the_same_bits_however_its_sequence_was_cut(isa: str, name: str, bits: int):
    """In one go; token by token and in odd pieces; among others; for any number of threads."""
    heads, kv_heads, d, n = SHAPES[name]
    x, rng = random_qkv(heads, kv_heads, d, n), np.random.default_rng(1)
    kernels.set_threads(2)
    whole = attend([Sequence(kv_heads, d, bits)], [x], heads, kv_heads, d, bits)
    for threads in (1, 3):
        kernels.set_threads(threads)
        sequence, done, pieces = Sequence(kv_heads, d, bits), 0, []
        while done < n:
            count = int(rng.choice([1, 3, 400] if n > 1000 else [1, 1, 2, 3, 5, 17, 64, 100]))
            pieces.append(attend([sequence], [x[done : done + count]], heads, kv_heads, d, bits))
            done += count
        assert np.array_equal(np.concatenate(pieces), whole)
    lengths = [n, 1, 7, min(n, 66)]
    together = attend([Sequence(kv_heads, d, bits) for _ in lengths], [x[:count] for count in lengths], heads, kv_heads, d, bits)
    for part, count in zip(np.split(together, np.cumsum(lengths)[:-1]), lengths, strict=True):
        assert np.array_equal(part, whole[:count])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 9),
    half=st.integers(1, 128),
    cuts=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    bits=st.sampled_from([16, 8]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_any_shape_and_any_cut_equal_fp64_and_the_whole(
    isa: str, kv_heads: int, group: int, half: int, cuts: list[int], bits: int, threads: int, seed: int
):
    heads, d, n = kv_heads * group, 2 * half, sum(cuts)
    x, sequence = random_qkv(heads, kv_heads, d, n, seed), Sequence(kv_heads, d, bits)
    kernels.set_threads(threads)
    found = np.concatenate([attend([sequence], [piece], heads, kv_heads, d, bits) for piece in np.split(x, np.cumsum(cuts)[:-1])])
    assert np.array_equal(found, attend([Sequence(kv_heads, d, bits)], [x], heads, kv_heads, d, bits))
    expected = oracle(x, heads, kv_heads, d)
    assert np.abs(found - expected).max() <= ANY_SHAPE[bits] * np.abs(expected).max()


@pytest.mark.parametrize("bits", [16, 8])
def test_a_ragged_batch_of_long_and_short_histories(isa: str, bits: int):
    """Sixteen sequences at different places, one token each and one long prompt, equal each of them alone."""
    heads, kv_heads, d = 4, 2, 16
    kernels.set_threads(2)
    histories = [0, 1, 63, 64, 65, 127, 500, 1023, 1024, 1025, 2047, 2048, 2100, 5, 64, 900]
    first = [random_qkv(heads, kv_heads, d, max(h, 1), seed) for seed, h in enumerate(histories)]
    new = [random_qkv(heads, kv_heads, d, 130 if i == 4 else 1, 100 + i) for i in range(len(histories))]
    together, alone = [], []
    for group in (together, alone):
        for history, x in zip(histories, first, strict=True):
            group.append(Sequence(kv_heads, d, bits))
            if history:
                attend([group[-1]], [x], heads, kv_heads, d, bits)
    found = attend(together, new, heads, kv_heads, d, bits)
    expected = [attend([sequence], [x], heads, kv_heads, d, bits) for sequence, x in zip(alone, new, strict=True)]
    assert np.array_equal(found, np.concatenate(expected))


@pytest.mark.parametrize("bits", [16, 8])
def test_large_key_biases_stay_finite_and_exact_enough(isa: str, bits: int):
    """Qwen2-7B's trap: keys of several hundred in some dimensions, whose products overflow fp16."""
    heads, kv_heads, d, n = 4, 1, 64, 200
    x = random_qkv(heads, kv_heads, d, n, bias=0.0)
    x[:, heads * d + d // 2 + 20 : heads * d + d // 2 + 28] += 300.0  # slow dimensions: nearly the same at every position
    found, expected = attend([Sequence(kv_heads, d, bits)], [x], heads, kv_heads, d, bits), oracle(x, heads, kv_heads, d)
    assert np.isfinite(found).all()
    if bits == 16:
        assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()


def test_factors_keep_what_large_biases_take_from_keys_of_eight_bits(isa: str):
    """Queries that look little at the biased dimensions, as trained ones do, against keys rounded with and without factors."""
    heads, kv_heads, d, n = 4, 1, 64, 200
    x = random_qkv(heads, kv_heads, d, n, bias=0.0)
    queries, keys = x[:, : heads * d].reshape(n, heads, 2, d // 2), x[:, heads * d : (heads + kv_heads) * d].reshape(n, 2, d // 2)
    keys[:, 1, 20:28] += 300.0
    queries[..., 20:28] /= 300.0
    factors = np.sqrt(np.square(keys).mean(0).sum(0, keepdims=True)).astype(np.float32)
    expected = oracle(x, heads, kv_heads, d)
    found = [attend([Sequence(kv_heads, d, 8)], [x], heads, kv_heads, d, 8, f) for f in (factors, None)]
    with_factors, without = (np.abs(y - expected).max() / np.abs(expected).max() for y in found)
    assert with_factors <= 0.03
    assert without > 10 * with_factors


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_reaches_those_who_see_it_alone(isa: str, bits: int, bad: float):
    heads, kv_heads, d, n = 4, 2, 16, 150
    clean = random_qkv(heads, kv_heads, d, n)
    whole = attend([Sequence(kv_heads, d, bits)], [clean], heads, kv_heads, d, bits)
    for column, heads_hit in ((3, [0]), (heads * d + 1, [0, 1]), ((heads + kv_heads) * d + d, [2, 3])):  # of q, k and v
        x = clean.copy()
        x[70, column] = bad
        found = attend([Sequence(kv_heads, d, bits)], [x], heads, kv_heads, d, bits)
        assert np.array_equal(found[:70], whole[:70])
        hit = found.reshape(n, heads, d)[70 if column < heads * d else slice(70, None)][..., heads_hit, :]
        assert not np.isfinite(hit).any()


def test_shapes_without_a_kernel_are_refused(isa: str):
    for heads, kv_heads, d, bits in ((4, 3, 16, 16), (4, 2, 16, 12), (65, 1, 16, 16), (2, 1, 258, 16), (2, 1, 3, 16)):
        sequence = Sequence(1, 64, 16)
        with pytest.raises(ValueError, match=r"^kernel: .* a shape without a kernel$"):
            attend([sequence], [np.zeros((1, (heads + 2 * kv_heads) * d), np.float32)], heads, kv_heads, d, bits)
