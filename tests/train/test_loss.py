"""The chunked cross-entropy against torch's own over all logits: values, gradients, memory and bad labels."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qwen2 import kernels
from qwen2.config import tiny
from qwen2.model import Qwen2
from qwen2.train import logprobs, loss
from qwen2.train.logprobs import token_logprobs
from qwen2.train.loss import cross_entropy
from tests.conftest import random_network


def plain(network: Qwen2, hidden: torch.Tensor, labels: torch.Tensor, z_loss: float) -> torch.Tensor:
    """The oracle: all logits at once."""
    logits = network.logits(hidden)
    z = logits.logsumexp(-1)[labels != -100].square().sum()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") + z_loss * z


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 512, (75,), generator=generator)
    labels[::7] = -100
    return torch.randn(75, 64, generator=generator).to(dtype), labels


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_value_and_gradients_equal_those_of_all_logits(tied: bool, z_loss: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 20 * 4 * 512)  # chunks of 20 rows, the last one shorter
    network = random_network(tiny(tied=tied)).double()
    hidden, labels = inputs()
    found = []
    for compute in ("ours", "plain"):
        network.zero_grad()
        h = hidden.clone().requires_grad_()
        if compute == "ours":
            total, count, metrics = cross_entropy(network, h, labels, z_loss)
            assert count == 64
            logits = network.logits(hidden)[labels != -100]
            torch.testing.assert_close(metrics["nll"], F.cross_entropy(logits, labels[labels != -100], reduction="sum"))
            torch.testing.assert_close(metrics["z"], logits.logsumexp(-1).square().sum())
        else:
            total = plain(network, h, labels, z_loss)
        (total / 64).backward()
        found.append((total.detach(), h.grad, network.head.weight.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_bfloat16_is_computed_under_autocast_and_summed_in_float32():
    network = random_network(tiny())
    hidden, labels = inputs(torch.float32)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, _, _ = cross_entropy(network, hidden, labels)
    total.backward()
    exact = hidden.detach().clone().requires_grad_()
    reference = plain(network, exact, labels, 0.0)
    reference.backward()
    assert total.dtype == torch.float32
    assert hidden.grad is not None
    assert exact.grad is not None
    assert total.item() == pytest.approx(reference.item(), rel=3e-3)
    assert total.item() != reference.item()
    assert float((hidden.grad - exact.grad).norm() / exact.grad.norm()) < 2e-2


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 16 * 4 * 512)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 512 and out.data_ptr() != head:
                largest = max(largest, len(out))
            return out

    network = random_network(tiny())
    head = network.head.weight.data_ptr()
    hidden, labels = inputs(torch.float32)
    hidden.requires_grad_()
    with Watch():
        total, _, _ = cross_entropy(network, hidden, labels)
        total.backward()
    assert largest == 16


def test_an_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch):
    """Though its weights could have some."""
    asked, entropy, (hidden, labels) = [], loss.entropy, inputs(torch.float32)
    monkeypatch.setattr(loss, "entropy", lambda *given: (asked.append(given[-1]), entropy(*given))[1])
    network = random_network(tiny()).requires_grad_(True)
    with torch.no_grad():
        quiet, _, _ = cross_entropy(network, hidden, labels)
    loud, _, _ = cross_entropy(network, hidden, labels)
    assert not any(asked[: len(asked) // 2])
    assert all(asked[len(asked) // 2 :])
    torch.testing.assert_close(quiet, loud)


def test_rows_without_a_target_get_no_gradient_and_none_at_all_is_zero():
    network = random_network(tiny())
    hidden, labels = inputs(torch.float32)
    hidden.requires_grad_()
    cross_entropy(network, hidden, labels)[0].backward()
    assert hidden.grad is not None
    assert hidden.grad[labels == -100].abs().sum() == 0
    assert (hidden.grad[labels != -100].abs().sum(1) > 0).all()
    total, count, _ = cross_entropy(network, hidden, torch.full_like(labels, -100))
    assert (float(total.detach()), count) == (0.0, 0)
    total.backward()


@pytest.mark.parametrize("label", [512, -1])
def test_a_label_outside_the_vocabulary_is_named(label: int):
    network = random_network(tiny())
    hidden, labels = inputs(torch.float32)
    labels[3] = label
    with pytest.raises(ValueError, match=rf"labels reach from .*{label}.*the vocabulary has 512 tokens"):
        cross_entropy(network, hidden, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_kernels_give_torchs_losses_and_gradients(dtype: torch.dtype, z_loss: float):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(21, 531, generator=generator).mul(3).to(dtype)
    targets = torch.randint(0, 531, (21,), generator=generator)
    ours = loss.entropy(logits.clone(), targets, z_loss, wanted=True)
    used = kernels.isa()
    kernels.select_isa("none")
    theirs = loss.entropy(logits.clone(), targets, z_loss, wanted=True)
    kernels.select_isa(used)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 4e-3)
    unwanted = logits.clone()
    for a, b in zip(loss.entropy(unwanted, targets, z_loss, wanted=False)[:2], ours, strict=False):
        assert torch.equal(a, b)
    assert torch.equal(unwanted, logits)


def test_infinite_logits_are_seen():
    logits = torch.randn(4, 64)
    logits[1, 3], logits[2, 5] = float("inf"), float("nan")
    losses, _, _ = loss.entropy(logits, torch.tensor([1, 2, 3, 4]), 0.0, wanted=True)
    assert losses.isfinite().tolist() == [True, False, False, True]


def test_one_chunk_of_logits_exists_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """The chunks are the largest pieces of a step with adapters, so that two of them would be its peak."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 20 * 4 * 512)
    entropy, alive, most = loss.entropy, weakref.WeakSet(), 0

    def watched(logits: torch.Tensor, *rest: Any) -> Any:
        nonlocal most
        alive.add(logits.untyped_storage())
        most = max(most, len(alive))
        return entropy(logits, *rest)

    for module in (loss, logprobs):
        monkeypatch.setattr(module, "entropy", watched)
    network = random_network(tiny())
    hidden, labels = inputs(torch.float32)
    hidden.requires_grad_()
    cross_entropy(network, hidden, labels)[0].backward()
    for learns in (False, True):  # only the states learn; the head too
        network.requires_grad_(learns)
        token_logprobs(network, hidden, torch.arange(len(labels)), labels.clamp(0)).sum().backward()
    assert most == 1
