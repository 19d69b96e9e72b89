"""Steps over frozen weights against the same in torch: adapters of all kinds, packed weights, dropout, bfloat16, what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qwen2 import kernels
from qwen2.config import ModelConfig, MoEConfig, tiny
from qwen2.model import Qwen2, fused, lora, training_frozen
from qwen2.model.lora import LoraSettings, lora_parameters, without_lora
from qwen2.quant import linear as packed_linear
from qwen2.weights.export import to_gguf
from qwen2.weights.model import load
from tests.conftest import random_network, tiny_model
from tests.model.test_lora import adapted
from tests.model.test_parity import our_logits

pytestmark = pytest.mark.skipif(kernels.isa() is None, reason="steps are written out for the kernels only; without them torch computes")
MOE = tiny(moe=MoEConfig(experts=4, active=2, expert_ffn=32, shared_ffn=96))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 512, (3, 41), generator=torch.Generator().manual_seed(1))


@contextmanager
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Step by step, as on another device."""
    with monkeypatch.context() as patch:
        patch.setattr(fused, "frozen", lambda *_: False)
        patch.setattr(fused.training, "computed", lambda *_: False)
        yield


def gradients(network: Qwen2, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of the adapters."""
    for parameter in network.parameters():
        parameter.grad = None
    logits = our_logits(network, tokens)
    F.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(-1, 1).flatten()).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in network.parameters())
    return logits.detach(), {name: parameter.grad for name, parameter in lora_parameters(network).items() if parameter.grad is not None}


def compare(network: Qwen2, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    calls: list[str] = []
    for name in ("normed_products", "added_product", "added_feed_forward"):
        step = getattr(training_frozen, name)
        monkeypatch.setattr(training_frozen, name, lambda *given, step=step, name=name: (calls.append(name), step(*given))[1])
    logits, found = gradients(network, tokens)
    moe = network.config.moe is not None
    assert calls == ["normed_products", "added_product", *([] if moe else ["added_feed_forward"])] * network.config.layers
    with in_torch(monkeypatch):
        expected_logits, expected = gradients(network, tokens)
    assert len(calls) == (2 if moe else 3) * network.config.layers
    torch.testing.assert_close(logits, expected_logits, rtol=rtol, atol=max(atol, 1e-4))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (LoraSettings(rank=4), tiny(tied=True)),
        (LoraSettings(rank=3, rslora=True, targets="attention"), tiny()),
        (LoraSettings(rank=3, targets="down_proj,k_proj"), tiny(kv_heads=1)),
        (LoraSettings(rank=3, targets="model.layers.1.mlp.up_proj"), tiny()),
        (LoraSettings(rank=4), MOE),
    ],
    ids=["all", "attention", "some", "one", "moe"],
)
def test_gradients_equal_those_of_torch(settings: LoraSettings, config: ModelConfig, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training_frozen, "ROWS", 50)  # the feed-forward part in three pieces
    compare(adapted(settings, random_network(config)).train(), tokens, monkeypatch)


def test_dropout_is_the_same_in_both_passes(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """With one seed for every layer both ways drop the same numbers."""
    monkeypatch.setattr(lora, "new_seed", lambda: 7)
    monkeypatch.setattr(training_frozen, "new_seed", lambda: 7)
    network = adapted(LoraSettings(rank=4, dropout=0.4)).train()
    compare(network, tokens, monkeypatch)
    logits, _ = gradients(network, tokens)
    assert not torch.equal(logits, gradients(network.eval(), tokens)[0])


def test_gradients_with_dropout_are_those_of_the_loss(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """Along the gradient the loss rises as fast as it says, where every piece of rows drops its own."""
    monkeypatch.setattr(training_frozen, "ROWS", 50)
    seeds = iter(range(100_000))
    monkeypatch.setattr(training_frozen, "new_seed", lambda: 1000 * next(seeds))
    network = adapted(LoraSettings(rank=4, dropout=0.4)).train()
    parameters = lora_parameters(network)
    labels = tokens.roll(-1, 1).flatten()

    def loss() -> float:
        nonlocal seeds
        seeds = iter(range(100_000))
        return F.cross_entropy(our_logits(network, tokens).flatten(0, 1).double(), labels).item()

    seeds = iter(range(100_000))
    _, found = gradients(network, tokens)
    norm = sum(gradient.square().sum() for gradient in found.values()).sqrt()
    losses = []
    for step in (0.01, -0.02):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += step * found[name] / norm
        losses.append(loss())
    assert (losses[0] - losses[1]) / 0.02 == pytest.approx(norm.item(), rel=0.01)


def test_bfloat16(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """Near the gradients of float32, in norm."""
    network = adapted(LoraSettings(rank=4)).train()
    _, exact = gradients(network, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = gradients(network, tokens)
    for name, gradient in found.items():
        assert (gradient - exact[name]).norm() < 0.06 * exact[name].norm(), name


def quantized(folder: Path, form: str, config: ModelConfig | None = None) -> tuple[Qwen2, Qwen2]:
    """A network with packed weights and the same with dequantized ones."""
    to_gguf(tiny_model(config), folder / "model.gguf", form)
    return load(folder / "model.gguf", packed=True).network, load(folder / "model.gguf").network


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (LoraSettings(rank=4), tiny(tied=True)),
        (LoraSettings(rank=4, targets="v_proj,down_proj"), tiny()),
        (LoraSettings(rank=4, dora=True), tiny(tied=True)),
        (LoraSettings(rank=4, targets="attention"), MOE),
    ],
    ids=["tied", "some", "dora", "moe"],
)
def test_gradients_through_packed_weights_equal_those_of_the_dequantized_model(
    form: str, settings: LoraSettings, config: ModelConfig, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(packed_linear, "BAND", 64 * 10)  # several bands a matrix
    packed, plain = (adapted(settings, network).train() for network in quantized(tmp_path, form, config))
    logits, found = gradients(packed, tokens)
    expected_logits, expected = gradients(plain, tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    if not settings.dora:
        compare(packed, tokens, monkeypatch)


def test_a_frozen_network_passes_gradients_on_without_adapters(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    """The base alone, and what stands below a layer that learns nothing."""
    network = adapted(LoraSettings(rank=4)).train()
    base = our_logits(random_network(tiny(tied=True)), tokens)
    with without_lora(network):
        torch.testing.assert_close(our_logits(network, tokens), base, rtol=1e-4, atol=1e-4)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    layer = random_network(tiny()).requires_grad_(False).model.layers[0]
    found = []
    for switch in (lambda: None, lambda: monkeypatch.setattr(fused, "frozen", lambda *_: False)):
        switch()
        x.grad = None
        layer.mlp(x, layer.post_attention_layernorm).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_what_is_kept_for_the_backward_pass_is_no_copy_of_a_weight(tokens: torch.Tensor):
    """Beside rows of activations only the adapters' own numbers: no matrix of the base's size, none of the norm's output."""
    network = adapted(LoraSettings(rank=4)).train()
    base = {parameter.data_ptr() for name, parameter in network.named_parameters() if "lora" not in name}
    kept: list[torch.Tensor] = []
    rows = tokens.numel()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        our_logits(network, tokens)
    sizes = [len(x) for x in kept if x.dim() == 2 and x.data_ptr() not in base]
    assert sizes
    assert set(sizes) <= {rows, network.config.heads}  # and attention's (H, N)
    by_layer = (
        sum(x.numel() for x in {x.data_ptr(): x for x in kept if x.dim() > 1 and len(x) == rows}.values()) / rows / network.config.layers
    )
    hidden, ffn, kv = network.config.hidden, network.config.ffn, network.config.kv_heads * network.config.head_dim
    assert by_layer < 2 * hidden + 2 * ffn + 2 * hidden + 2 * kv + 7 * 4 + 2 * hidden
