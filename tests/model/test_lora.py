"""Adapters against PEFT on fixed tensors: logits, gradients, first values; targets; merging; the base alone."""

from __future__ import annotations

import pytest
import torch

from qwen2.config import MoEConfig, tiny
from qwen2.model import Qwen2
from qwen2.model.lora import Dropout, LoraSettings, add_lora, dropped, lora_parameters, merge, targeted, without_lora
from tests.conftest import random_network
from tests.model.test_parity import our_logits


def adapted(settings: LoraSettings, network: Qwen2 | None = None, seed: int = 0) -> Qwen2:
    """A network whose adapters all matter: B is random too."""
    network = random_network(tiny(tied=True)) if network is None else network
    generator = torch.Generator().manual_seed(seed)
    add_lora(network, settings, generator)
    with torch.no_grad():
        for name, parameter in lora_parameters(network).items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.2 * noise) if "magnitude" in name else 0.1 * noise)
    return network


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(1))


SETTINGS = {
    "lora": LoraSettings(rank=4, alpha=8),
    "rslora": LoraSettings(rank=4, alpha=8, rslora=True, targets="attention"),
    "dora": LoraSettings(rank=4, alpha=8, dora=True),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_merged_equals_adapted_and_the_base_is_there_meanwhile(settings: LoraSettings, tokens: torch.Tensor):
    base = our_logits(random_network(tiny(tied=True)), tokens)
    network = adapted(settings)
    logits = our_logits(network, tokens)
    assert (logits - base).abs().max() > 0.05
    with without_lora(network):
        assert torch.equal(our_logits(network, tokens), base)
    unpacked = dict(network.tensors())
    merge(network)
    torch.testing.assert_close(our_logits(network, tokens), logits, rtol=1e-4, atol=1e-4)
    assert not lora_parameters(network)
    assert all(torch.equal(tensor, unpacked[name]) for name, tensor in network.tensors())
    assert set(unpacked) == {name for name, _ in network.named_parameters()}


def test_a_new_adapter_changes_nothing_and_alone_gets_gradients(tokens: torch.Tensor):
    network = random_network(tiny())
    base = our_logits(network, tokens).detach()
    for dora in (False, True):
        network = random_network(tiny())
        add_lora(network, LoraSettings(rank=4, dora=dora))
        logits = our_logits(network.train(), tokens)
        torch.testing.assert_close(logits, base, rtol=1e-5, atol=1e-5)
        logits.square().mean().backward()
        with_gradient = {name for name, p in network.named_parameters() if p.grad is not None}
        assert with_gradient == set(lora_parameters(network)) == {name for name, p in network.named_parameters() if p.requires_grad}
        assert len(with_gradient) == 2 * 7 * (3 if dora else 2)


def test_targets():
    network = random_network(tiny(moe=MoEConfig(experts=4, active=2, expert_ffn=32, shared_ffn=96)))
    leaves = {path.rpartition(".")[2] for path in targeted(network, ["all-linear"])}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "shared_expert_gate"}
    assert targeted(network, ["lm_head", "model.layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj", "lm_head"]
    assert len(targeted(network, ["attention"])) == 8
    assert LoraSettings(targets="q_proj, v_proj").names == ("q_proj", "v_proj")
    with pytest.raises(
        ValueError, match=r"target 'w_pack': there is no such layer; this model has all-linear, attention, q_proj, .*lm_head"
    ):
        targeted(network, ["w_pack"])
    with pytest.raises(ValueError, match=r"target 'embed_tokens': the embedding is looked up"):
        targeted(network, ["embed_tokens"])
    for name in ("lm_head", "embed_tokens", "model.embed_tokens"):
        with pytest.raises(
            ValueError, match=f"target '{name}': the embedding and the output head are one matrix.*this model has .*down_proj$"
        ):
            targeted(random_network(tiny(tied=True)), ["q_proj", name])
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(adapted(LoraSettings()), LoraSettings())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank 0: must be a whole number"),
        ({"rank": 2.0}, "rank 2.0: must be a whole number"),
        ({"alpha": 0.0}, "alpha 0.0: must be a number above 0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"dropout": 1.0}, "dropout 1.0: must be a number from 0 to below 1"),
        ({"targets": ""}, "targets '': must be all-linear, attention or names"),
        ({"targets": ()}, r"targets \(\)"),
    ],
)
def test_settings_are_checked(changes: dict[str, object], words: str):
    with pytest.raises(ValueError, match=words):
        LoraSettings(**changes)  # type: ignore[arg-type]


def test_dropout_keeps_the_mean_and_its_choice():
    x = torch.ones(400, 1000, requires_grad=True)
    torch.manual_seed(3)
    y = Dropout.apply(x, 0.3)
    zeros = (y == 0).float().mean()
    assert abs(zeros - 0.3) < 0.003  # four deviations of 400,000 draws
    assert y.mean().item() == pytest.approx(1.0, abs=0.005)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert not torch.equal(dropped(x.detach(), 0.3, 1), dropped(x.detach(), 0.3, 2))
    torch.manual_seed(3)
    assert torch.equal(Dropout.apply(x, 0.3), y)
    assert torch.equal(dropped(torch.ones(3, 3), 0.0, 1), torch.ones(3, 3))
