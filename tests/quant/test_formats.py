"""The block formats against the gguf package's own: the same bits out of the same bytes, and the same bytes out of the same weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as reference_dequantize
from gguf.quants import quantize as reference_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.quant import FORMATS, dequantize, dequantize_rows, format_id, quantize
from qwen2.quant.layout import LAYOUTS
from qwen2.quant.tensors import PIECE

NAMES = [form.name for form in FORMATS.values()]
WRITTEN = ["F32", "F16", "BF16", "Q8_0"]  # plain rounding; the others search (test_pack.py)
SCALES = {  # format: where its blocks hold fp16 numbers
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
EXTREME = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00]  # +-0, subnormal, max, inf, nan


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Equal to the bit; a NaN equals any NaN, whose payload the processor's instructions choose."""
    a, b = ours.numpy().reshape(-1), theirs.reshape(-1)
    nan = np.isnan(a)
    return np.array_equal(nan, np.isnan(b)) and np.array_equal(a.view(np.uint32)[~nan], b.view(np.uint32)[~nan])


def reference(raw: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return reference_dequantize(raw, gguf.GGMLQuantizationType[name])


def test_layouts_are_ggml_s() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: tuple(layout) for kind, layout in LAYOUTS.items() if kind in theirs} == theirs
    assert {kind: (form.name, form.block, form.bytes) for kind, form in FORMATS.items()} == {kind: theirs[kind] for kind in FORMATS}


@pytest.mark.parametrize("name", NAMES)
def test_random_blocks_unpack_to_the_same_bits(name: str) -> None:
    form = FORMATS[format_id(name)]
    raw = np.random.default_rng(1).integers(0, 256, (257, form.bytes), dtype=np.uint8)
    assert same_bits(dequantize(raw, format_id(name), (257, form.block)), reference(raw, name))


@pytest.mark.parametrize("name", ["Q5_0", "Q5_1", "IQ4_NL"])
def test_tables_are_made_once_and_not_for_every_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMATS[format_id(name)]
    for function in ("arange", "tensor"):
        monkeypatch.setattr(torch, function, None)
    dequantize(np.zeros((3, form.bytes), dtype=np.uint8), format_id(name), (3, form.block))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", SCALES)
def test_extreme_scales_unpack_to_the_same_bits(name: str, data: st.DataObject) -> None:
    form = FORMATS[format_id(name)]
    raw = np.frombuffer(data.draw(st.binary(min_size=form.bytes, max_size=form.bytes)), dtype=np.uint8).copy()
    for at in SCALES[name]:
        raw[at : at + 2] = np.array([data.draw(st.sampled_from(EXTREME))], dtype="<u2").view(np.uint8)
    assert same_bits(dequantize(raw, format_id(name), (1, form.block)), reference(raw.reshape(1, -1), name))


@pytest.mark.parametrize("name", NAMES)
def test_pieces_join(name: str) -> None:
    """A tensor of more than one piece, the last of them short, equals its halves unpacked by themselves."""
    number = format_id(name)
    form = FORMATS[number]
    blocks = PIECE // form.block + 3
    raw = np.random.default_rng(2).integers(0, 256, blocks * form.bytes, dtype=np.uint8)
    whole = dequantize(raw, number, (blocks * form.block,))
    half = blocks // 2
    first = dequantize(raw[: half * form.bytes], number, (half * form.block,))
    second = dequantize(raw[half * form.bytes :], number, (blocks * form.block - half * form.block,))
    assert torch.equal(whole.view(torch.int32), torch.cat([first, second]).view(torch.int32))


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e4])
def test_packed_bytes_are_the_gguf_package_s(name: str, spread: float) -> None:
    weights = torch.randn(70, 96, generator=torch.Generator().manual_seed(3)) * spread
    weights[5] = 0
    weights[6, :32] = torch.linspace(-127, 127, 32) / 2  # halves, which are rounded away from zero
    with np.errstate(all="ignore"):
        theirs = reference_quantize(weights.numpy(), gguf.GGMLQuantizationType[name])
    assert quantize(weights, format_id(name)).tobytes() == theirs.tobytes()


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
@settings(deadline=None)
def test_bf16_packs_every_number_as_ggml_does(bits: list[int]) -> None:
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    theirs = reference_quantize(values, gguf.GGMLQuantizationType.BF16)
    assert quantize(torch.from_numpy(values.copy()), format_id("BF16")).tobytes() == theirs.tobytes()


def test_out_of_another_dtype_is_rounded_once() -> None:
    raw = np.random.default_rng(4).integers(0, 120, (64, 144), dtype=np.uint8)
    out = torch.zeros(64, 256, dtype=torch.bfloat16)
    result = dequantize(raw, format_id("Q4_K"), (64, 256), out=out)
    assert result is out
    assert torch.equal(out, dequantize(raw, format_id("Q4_K"), (64, 256)).to(torch.bfloat16))


def test_rows_are_those_of_the_whole() -> None:
    raw = np.random.default_rng(5).integers(0, 120, 40 * 3 * 22, dtype=np.uint8)
    rows = torch.tensor([39, 0, 7, 7])
    whole = dequantize(raw, format_id("Q5_0"), (40, 96))
    assert torch.equal(dequantize_rows(raw, format_id("Q5_0"), 96, rows), whole[rows])


def test_read_only_arrays_are_accepted() -> None:
    raw = np.arange(34, dtype=np.uint8)
    raw.flags.writeable = False
    assert dequantize(raw, format_id("Q8_0"), (32,)).shape == (32,)


def test_errors_say_what_and_what_else() -> None:
    names = "F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, BF16"
    raw = np.zeros(34, dtype=np.uint8)
    cases = {
        f"ggml type 16 is not supported; supported are {names}": lambda: dequantize(raw, 16, (32,)),
        f"quantization 'q9' is not known; known are {names}": lambda: format_id("q9"),
        "rows of 48 weights are not whole Q8_0 blocks of 32": lambda: dequantize(raw, 8, (2, 48)),
        "shape (2, 32) as Q8_0 takes 68 bytes, not 34": lambda: dequantize(raw, 8, (2, 32)),
        "rows of 96 weights are not whole Q4_K blocks of 256": lambda: quantize(torch.zeros(2, 96), 12),
        "rows of 33 weights are not whole Q8_0 blocks of 32": lambda: quantize(torch.zeros(2, 33), 8),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_threads_change_nothing(name: str) -> None:
    """The bits, and torch's own setting, are the same whoever unpacks which piece."""
    number, form = format_id(name), FORMATS[format_id(name)]
    blocks = 5 * PIECE // form.block + 7
    raw = np.random.default_rng(6).integers(0, 256, blocks * form.bytes, dtype=np.uint8)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(dequantize(raw, number, (blocks, form.block)).view(torch.int32))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
