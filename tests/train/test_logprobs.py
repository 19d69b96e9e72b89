"""Chunked log-probabilities against torch's over all logits: values, gradients with a factor for each token, memory, bad tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen2 import kernels
from qwen2.config import tiny
from qwen2.model.lora import LoraSettings, lora_parameters
from qwen2.train import loss
from qwen2.train.logprobs import token_logprobs
from qwen2.weights.export import to_gguf
from qwen2.weights.model import load
from tests.conftest import random_network, tiny_model
from tests.model.test_lora import adapted


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Hidden states, rows of which some say two tokens, the tokens, and a factor for each."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(75, 64, generator=generator).to(dtype)
    rows = torch.cat([torch.arange(0, 75, 2), torch.tensor([0, 4, 74, 4])])
    targets = torch.randint(0, 512, (len(rows),), generator=generator)
    return hidden, rows, targets, torch.randn(len(rows), generator=generator).to(dtype)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_those_of_all_logits(frozen: bool, tied: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 20 * 4 * 512)  # chunks of 20 rows, the last one shorter
    network = random_network(tiny(tied=tied)).to(dtype).requires_grad_(not frozen)
    hidden, rows, targets, factors = inputs(dtype)
    found = []
    for compute in ("ours", "plain"):
        network.zero_grad()
        h = hidden.clone().requires_grad_()
        if compute == "ours":
            logprobs = token_logprobs(network, h, rows, targets)
        else:
            logprobs = network.logits(h).log_softmax(-1)[rows, targets]
        (logprobs * factors).sum().backward()
        assert h.grad is not None
        found.append((logprobs.detach(), h.grad, network.head.weight.grad))
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for ours, theirs in zip(*found, strict=True):
        if theirs is None:
            assert ours is None
            assert frozen
        else:
            torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_more_than_a_chunk_of_logits_exists(frozen: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 16 * 4 * 512)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 512 and out.data_ptr() != head:
                largest = max(largest, len(out))
            return out

    network = random_network(tiny()).requires_grad_(not frozen)
    head = network.head.weight.data_ptr()
    hidden, rows, targets, _ = inputs(torch.float32)
    hidden.requires_grad_()
    with Watch():
        token_logprobs(network, hidden, rows, targets).sum().backward()
    assert largest == 16


def test_without_a_gradient_only_values_are_computed(monkeypatch: pytest.MonkeyPatch):
    network = random_network(tiny())
    hidden, rows, targets, _ = inputs(torch.float32)
    wanted = []
    plain = loss.entropy
    monkeypatch.setattr("qwen2.train.logprobs.entropy", lambda *args: (wanted.append(args[3]), plain(*args))[1])
    with torch.no_grad():
        found = token_logprobs(network, hidden, rows, targets)
    assert wanted == [False]
    assert not found.requires_grad
    torch.testing.assert_close(found, network.logits(hidden).log_softmax(-1)[rows, targets].detach(), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_computed_under_autocast_and_given_in_float32():
    hidden, rows, targets, factors = inputs(torch.float32)
    found = []
    for enabled in (True, False):
        network = random_network(tiny())
        h = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logprobs = token_logprobs(network, h, rows, targets)
        assert logprobs.dtype == torch.float32
        (logprobs * factors).sum().backward()
        found.append((logprobs.detach(), h.grad, network.head.weight.grad))
    for ours, exact in zip(*found, strict=True):
        assert ours is not None
        assert exact is not None
        assert 0 < float((ours - exact).norm() / exact.norm()) < 2e-2


HEAD = {"plain": None, "lora": LoraSettings(rank=4, targets="lm_head,q_proj"), "dora": LoraSettings(rank=4, targets="lm_head", dora=True)}


@pytest.mark.parametrize("packed", [False, True], ids=["weights", "packed"])
@pytest.mark.parametrize("settings", HEAD.values(), ids=HEAD)
def test_heads_that_are_packed_or_adapted(settings: LoraSettings | None, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if packed and kernels.isa() is None:
        pytest.skip("this installation has no kernels for this processor")
    monkeypatch.setattr(loss, "CHUNK_BYTES", 16 * 4 * 512)
    monkeypatch.setattr(loss, "BANDED_BYTES", 16 * 4 * 512)
    if packed:
        to_gguf(tiny_model(), tmp_path / "model.gguf", "Q8_0")
        network = load(tmp_path / "model.gguf", packed=True).network
    else:
        network = random_network(tiny()).requires_grad_(False)
    if settings is not None:
        network = adapted(settings, network).train()
    hidden, rows, targets, factors = inputs(torch.float32)
    found = []
    for compute in ("ours", "plain"):
        for parameter in network.parameters():
            parameter.grad = None
        h = hidden.clone().requires_grad_()
        logprobs = token_logprobs(network, h, rows, targets) if compute == "ours" else network.logits(h).log_softmax(-1)[rows, targets]
        (logprobs * factors).sum().backward()
        of_head = [parameter.grad for name, parameter in lora_parameters(network).items() if name.startswith("lm_head")]
        found.append((logprobs.detach(), h.grad, *of_head))
    assert len(found[0]) == 2 + (0 if settings is None else 3 if settings.dora else 2)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("token", [512, -1])
def test_a_token_outside_the_vocabulary_is_named(token: int):
    hidden, rows, targets, _ = inputs(torch.float32)
    targets[3] = token
    with pytest.raises(ValueError, match=rf"tokens reach from .*{token}.*the vocabulary has 512"):
        token_logprobs(random_network(tiny()), hidden, rows, targets)
