"""A training step by the kernels beside the same step in torch alone: values and all gradients, whatever the shape."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2 import kernels
from qwen2.config import ModelConfig, MoEConfig, tiny
from qwen2.model import Qwen2, packed_attend, training_moe
from qwen2.model import training as steps
from qwen2.model.training_moe import BLOCK, sorted_by_expert
from tests.conftest import SHAPES, random_network

LENGTHS = (130, 1, 64, 90, 7)
ODD = {
    "odd-widths": tiny(hidden=72, heads=4, kv_heads=4, ffn=100),  # heads of 18: no whole vector
    "wide-heads": tiny(hidden=192, heads=2, kv_heads=1),
    "one-group": tiny(heads=4, kv_heads=1),
}

ALL_ACTIVE = tiny(moe=MoEConfig(experts=4, active=4, expert_ffn=32, shared_ffn=96))  # no choice that a rounding could turn


@pytest.fixture(params=[*SHAPES, *ODD])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return (SHAPES | ODD)[request.param]


def step(network: Qwen2, lengths: tuple[int, ...], dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a ragged batch."""
    network.zero_grad()
    tokens = torch.randint(0, network.config.vocab, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        hidden = network(tokens, packed_attend(network.config, positions, lengths))
        loss = F.cross_entropy(network.logits(hidden).float(), tokens.roll(-1))
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None}


def in_torch(network: Qwen2, lengths: tuple[int, ...], dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle: the same without kernels."""
    used = kernels.isa()
    kernels.select_isa("none")
    found = step(network, lengths, dtype)
    kernels.select_isa(used)
    return found


def errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """How far each gradient lies from the other, by its length."""
    assert ours.keys() == theirs.keys()
    return {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-6)) for name in ours}


def test_a_mixture_is_two_functions(monkeypatch: pytest.MonkeyPatch):
    network, seen = random_network(SHAPES["moe"]).requires_grad_(), calls(monkeypatch)
    step(network, LENGTHS)
    assert seen == ["NormedProducts", "RotatedAttention", "AddedProduct", "Norm", "SharedExpert", "RoutedExperts"] * 2 + ["Norm"]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions of model/training.py and training_moe.py, as they are called."""
    seen: list[str] = []
    for name in ("NormedProducts", "AddedProduct", "AddedFeedForward", "RotatedAttention", "Norm", "RoutedExperts", "SharedExpert"):
        function = getattr(steps, name, None) or getattr(training_moe, name)
        real = function.apply
        monkeypatch.setattr(function, "apply", lambda *given, name=name, real=real: (seen.append(name), real(*given))[1])
    return seen


def test_a_step_is_torchs(isa: str, config: ModelConfig):
    network = random_network(config).requires_grad_()
    loss, gradients = step(network, LENGTHS)
    expected, theirs = in_torch(network, LENGTHS)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert max(errors(gradients, theirs).values()) < 2e-5


def test_a_mixture_whose_experts_get_one_row_or_none(isa: str):
    network = random_network(SHAPES["moe"]).requires_grad_()
    _, gradients = step(network, (3,))
    _, theirs = in_torch(network, (3,))
    assert max(errors(gradients, theirs).values()) < 2e-5
    idle = gradients["model.layers.0.mlp.experts.down_proj"].flatten(1).abs().amax(1) == 0
    assert idle.sum() >= 2, "three tokens with two experts each of eight"


def test_rows_sorted_by_expert_are_found_again():
    chosen = torch.tensor([[3, 1], [1, 0], [3, 0], [1, 3]])
    order = sorted_by_expert(chosen, 4)
    assert order.counts == [BLOCK, BLOCK, 0, BLOCK]
    assert torch.equal(order.rows[order.places], torch.arange(4)[:, None].expand(4, 2))
    assert torch.equal(order.places.div(BLOCK, rounding_mode="floor"), torch.tensor([0, 1, 9, 2])[chosen])


def test_a_dense_layer_is_four_functions(monkeypatch: pytest.MonkeyPatch):
    network, seen = random_network(tiny()).requires_grad_(), calls(monkeypatch)
    step(network, LENGTHS)
    assert seen == ["NormedProducts", "RotatedAttention", "AddedProduct", "AddedFeedForward"] * 2 + ["Norm"]


@pytest.mark.parametrize("shape", [tiny(layers=3), ALL_ACTIVE, ODD["one-group"], ODD["odd-widths"]])
def test_bfloat16_is_no_further_from_float32_than_torchs(isa: str, shape: ModelConfig):
    network = random_network(shape).requires_grad_()
    _, exact = in_torch(network, LENGTHS)
    _, ours = step(network, LENGTHS, torch.bfloat16)
    _, theirs = in_torch(network, LENGTHS, torch.bfloat16)
    ours_off, theirs_off = errors(ours, exact), errors(theirs, exact)
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert sum(ours_off.values()) < 1.1 * sum(theirs_off.values())
    for name in ours_off:  # small ones, as what remains of a sum that cancels out, have more of it
        assert ours_off[name] < 3 * theirs_off[name] + 1e-3, name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(isa: str, dtype: torch.dtype | None):
    network = random_network(tiny(heads=4, kv_heads=1)).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
            q, k, v = (x[:, at : at + 16 * h].unflatten(1, (h, 16)).to(dtype or torch.float32) for at, h in ((0, 2), (32, 1), (48, 1)))
            angles = torch.rand(300, 1, 8, generator=torch.Generator().manual_seed(1))
            lengths = torch.tensor([200, 100], dtype=torch.int32)
            leaves = [part.clone().requires_grad_() for part in (q, k, v)]
            out = steps.RotatedAttention.apply(*leaves, angles.cos(), angles.sin(), lengths)
            attention = [out, *torch.autograd.grad(out.float().square().sum(), leaves)]
            y, inverse = steps.normed(x, network.model.norm.weight, 1e-6, torch.float32)
            norm = steps.norm_gradients(x, network.model.norm.weight, inverse, y.clone(), x)
            found.append([tensor.detach() for tensor in (*attention, y, *norm, steps.sum_of_rows(x))])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_a_sequence_is_the_same_alone_and_in_company(isa: str):
    network = random_network(replace(tiny(), tied=True)).requires_grad_()
    tokens = torch.arange(150)
    hidden = network(tokens, packed_attend(network.config, torch.arange(150), (150,)))
    lengths = (33, 150, 80)
    positions = torch.cat([torch.arange(length) for length in lengths])
    more = torch.cat([torch.arange(33) + 7, tokens, torch.arange(80) + 9])
    torch.testing.assert_close(network(more, packed_attend(network.config, positions, lengths))[33:183], hidden, rtol=1e-5, atol=1e-5)


def test_frozen_hooked_and_replaced_layers(isa: str):
    """A gradient stops at frozen weights, a hook is heard, and a layer of another kind does its own work."""
    network = random_network(tiny()).requires_grad_()
    _, whole = in_torch(network, LENGTHS)
    heard: list[int] = []
    network.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *given: heard.append(1))
    for parameter in network.model.layers[0].self_attn.parameters():
        parameter.requires_grad_(False)
    network.model.layers[1].self_attn.q_proj = torch.nn.Sequential(network.model.layers[1].self_attn.q_proj)
    _, gradients = step(network, LENGTHS)
    assert heard == [1]
    assert not [name for name in gradients if name.startswith("model.layers.0.self_attn.")]
    renamed = {name.replace("q_proj.0", "q_proj"): gradient for name, gradient in gradients.items()}
    assert max(errors(renamed, {name: whole[name] for name in renamed}).values()) < 2e-5


def test_what_is_not_finite_stays_so(isa: str):
    network = random_network(tiny()).requires_grad_()
    with torch.no_grad():
        network.model.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
    loss, gradients = step(network, LENGTHS)
    assert loss.isnan()
    assert gradients["model.layers.0.mlp.up_proj.weight"].isnan().any()


def test_activations_checkpointed_are_the_same(isa: str):
    from torch.utils.checkpoint import checkpoint

    network = random_network(tiny()).requires_grad_()
    _, expected = step(network, LENGTHS)
    for layer in network.model.layers:
        plain = layer.forward
        layer.forward = lambda *given, plain=plain: checkpoint(plain, *given, use_reentrant=False)  # type: ignore[method-assign]
    _, gradients = step(network, LENGTHS)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
