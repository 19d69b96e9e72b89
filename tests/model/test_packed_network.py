"""Networks whose matrices are packed for the kernels, against the same networks as plain parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen2 import LLM, SamplingParams, kernels
from qwen2.config import ModelConfig
from qwen2.engine.about import about
from qwen2.model import Qwen2, packed_attend
from qwen2.model.linear import Linear
from qwen2.quant.linear import PackedLinear
from qwen2.weights.export import to_gguf, to_hf_folder
from qwen2.weights.model import load, say_fallback
from tests.conftest import tiny_model
from tests.kernels.conftest import pack, sets_here, unit_blocks

pytestmark = pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")


def hidden_of(network: Qwen2, tokens: torch.Tensor, router_logits: list[torch.Tensor] | None = None) -> torch.Tensor:
    return network(tokens, packed_attend(network.config, torch.arange(len(tokens)), [len(tokens)]), router_logits)


@pytest.fixture
def folder(shape: ModelConfig, tmp_path: Path) -> Path:
    to_hf_folder(tiny_model(shape), tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def test_float_weights_give_the_plain_network(folder: Path):
    plain, packed = load(folder).network, load(folder, packed=True).network
    assert packed.packed
    assert not plain.packed
    tokens = torch.randint(0, 300, (37,), generator=torch.Generator().manual_seed(0))
    routed: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    a, b = (hidden_of(network, tokens, logits) for network, logits in zip((plain, packed), routed, strict=True))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.logits(b), plain.logits(a), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(*routed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_every_parameter_comes_back(folder: Path):
    plain, packed = dict(load(folder).network.tensors()), dict(load(folder, packed=True).network.tensors())
    assert plain.keys() == packed.keys()
    assert all(torch.equal(plain[name], packed[name]) for name in plain)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q6_K"])
def test_products_without_kernels_are_those_of_the_kernels(name: str):
    """The torch fallback, weights widened and input rounded to int8: 1e-4 of the largest output."""
    from tests.kernels.conftest import dense, multiply, pack, random_blocks

    blocks = random_blocks(name, 48, 512, 0)
    layer = Linear(512, 48, bias=False)
    layer.weight = torch.nn.Parameter(torch.from_numpy(dense(name, blocks, 48, 512)).float())
    layer.int8_input = True
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    with torch.inference_mode():
        fallback = layer(x)
    native = torch.from_numpy(multiply([pack(name, blocks, 48, 512)], x.numpy()))
    torch.testing.assert_close(fallback, native, rtol=0, atol=1e-4 * float(native.abs().max()))


def test_without_kernels_a_quantized_file_is_said_to_run_in_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    to_gguf(tiny_model(), tmp_path / "model.gguf", "Q8_0")
    native = LLM(tmp_path / "model.gguf").logits(list(range(40)))
    monkeypatch.setattr(kernels, "library", lambda: None)
    say_fallback.cache_clear()
    fallback = LLM(tmp_path / "model.gguf")
    again = LLM(tmp_path / "model.gguf")
    told = "qwen2: this installation has no native library: computing in torch, several times slower and with weights widened to float32\n"
    assert capsys.readouterr().err == told  # once
    assert not fallback.model.network.packed
    assert not again.model.network.packed
    logits = fallback.logits(list(range(40)))
    assert (logits - native).abs().max() < 0.02 * native.abs().max()  # a rounding to int8 may fall the other way


@pytest.mark.parametrize("band", [1 << 23, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_product_is_the_dense_one_however_it_is_cut(band: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Bands of a few rows, or the whole matrix; more dimensions than two; under autocast in its type; no rows at all."""
    monkeypatch.setattr("qwen2.quant.linear.BAND", band)
    layer = PackedLinear(pack("Q5_0", unit_blocks("Q5_0", 37, 96, 0), 37, 96))
    weight = dict(layer.unpack())["weight"]
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
        expected = torch.nn.functional.linear(x, weight)
    assert y.dtype == expected.dtype == dtype
    (dx,), (right,) = (torch.autograd.grad(out.float().square().sum(), x) for out in (y, expected))
    tight = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-1}
    torch.testing.assert_close(y, expected, **tight)
    torch.testing.assert_close(dx, right, **tight)
    assert layer(torch.empty(0, 96)).shape == (0, 37)


def test_gradients_flow_through_packed_weights(folder: Path):
    """dX = dY W: the input's gradient through every layer, against the plain network's; nothing is rounded to int8."""
    plain, packed = load(folder).network, load(folder, packed=True).network
    gradients = []
    for network in (plain, packed):
        x = torch.randn(7, network.config.hidden, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = x
        attend = packed_attend(network.config, torch.arange(7), [7])
        for layer in network.model.layers:
            y = layer(y, attend, None)
        network.logits(network.model.norm(y)).square().mean().backward()
        gradients.append(x.grad)
    assert gradients[0] is not None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_torch_can_be_asked_for_beside_a_packed_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    to_gguf(tiny_model(), tmp_path / "model.gguf", "Q8_0")
    native = LLM(tmp_path / "model.gguf")
    expected = native.logits(list(range(40)))
    say_fallback.cache_clear()
    try:
        asked = LLM(tmp_path / "model.gguf", isa="none")
        assert "no kernels are chosen" in capsys.readouterr().err
        assert not asked.model.network.packed
        assert (asked.logits(list(range(40))) - expected).abs().max() < 0.02 * expected.abs().max()
        assert torch.equal(native.logits(list(range(40))), expected)
        with pytest.raises(
            ValueError, match=r"^isa 'none': model\.gguf is packed for \w+ already; leave isa out, or give the model's name or path"
        ):
            LLM(native.model, isa="none")
        with pytest.raises(
            ValueError, match=r"^isa 'avx2': model\.gguf is computed with in torch already; leave isa out, or give the model's"
        ):
            LLM(asked.model, isa="avx2")
    finally:
        kernels.select_isa(None)


@pytest.mark.parametrize("in_steps", [False, True])
def test_models_of_different_sets_answer_side_by_side(tmp_path: Path, in_steps: bool):
    """The first keeps its set and its bits, also layer by layer, when another is loaded; both sizes of a cache."""
    sets = sets_here()
    if len(sets) < 2:
        pytest.skip("this processor has one set of kernels")
    to_gguf(tiny_model(), tmp_path / "model.gguf", "Q8_0")
    ids, llms, expected = list(range(40)), {}, {}
    try:
        for name, bits in zip(reversed(sets), (8, 16), strict=False):  # the least first: the best is chosen then
            llms[name] = LLM(tmp_path / "model.gguf", isa=name, cache_bits=bits)
            if in_steps:
                llms[name].model.network.model.bound = False
            expected[name] = llms[name].logits(ids)
        assert not torch.equal(*expected.values())
        LLM(tmp_path / "model.gguf")
        for name, llm in llms.items():
            assert torch.equal(llm.logits(ids), expected[name])
            assert f"kernels for {name}, " in about(llm).computing
    finally:
        kernels.select_isa(None)


def test_a_model_that_cannot_be_loaded_changes_nothing(tmp_path: Path):
    to_gguf(tiny_model(), tmp_path / "model.gguf", "Q8_0")
    (tmp_path / "broken.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:-5000])
    before, isa, threads = torch.get_num_threads(), sets_here()[-1], kernels.threads()
    try:
        llm = LLM(tmp_path / "model.gguf", isa=isa, threads=3)
        LLM(tmp_path / "model.gguf", isa=isa)  # whose threads are not said: they stay
        assert (kernels.isa(), kernels.threads(), torch.get_num_threads()) == (isa, 3, 3)
        for path, more in (
            ("broken.gguf", {}),
            ("model.gguf", {"cache_bits": 5}),
            ("nowhere.gguf", {"isa": "none"}),
            ("model.gguf", {"context": 10**6}),
        ):
            with pytest.raises((ValueError, FileNotFoundError)):
                LLM(tmp_path / path, threads=2, **more)
            assert (kernels.isa(), kernels.threads(), torch.get_num_threads()) == (isa, 3, 3)
        assert llm.generate(["the fox"], SamplingParams(temperature=0, max_tokens=3))[0].token_ids
    finally:
        kernels.select_isa(None)
        kernels.set_threads(threads)
        torch.set_num_threads(before)
