"""The chunked loss of heads that are packed, adapted, or both, against all logits at once in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qwen2 import kernels
from qwen2.config import tiny
from qwen2.model.lora import LoraSettings, lora_parameters
from qwen2.quant import linear as packed_linear
from qwen2.train import loss
from qwen2.train.loss import cross_entropy
from qwen2.weights.export import to_gguf
from qwen2.weights.model import load
from tests.conftest import random_network, tiny_model
from tests.model.test_lora import adapted

HEAD = {"plain": None, "lora": LoraSettings(rank=4, targets="lm_head,q_proj"), "dora": LoraSettings(rank=4, targets="lm_head", dora=True)}


@pytest.mark.parametrize("packed", [False, True], ids=["weights", "packed"])
@pytest.mark.parametrize("settings", HEAD.values(), ids=HEAD)
def test_losses_and_gradients(settings: LoraSettings | None, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if packed and kernels.isa() is None:
        pytest.skip("this installation has no kernels for this processor")
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 512 * 16)  # chunks of 16 rows, and of 64 where it is packed
    monkeypatch.setattr(loss, "BANDED_BYTES", 4 * 512 * 64)
    monkeypatch.setattr(packed_linear, "BAND", 64 * 100)  # six bands of the vocabulary
    if packed:
        to_gguf(tiny_model(), tmp_path / "model.gguf", "Q8_0")
        network = load(tmp_path / "model.gguf", packed=True).network
    else:
        network = random_network(tiny()).requires_grad_(False)
    if settings is not None:
        network = adapted(settings, network).train()
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(150, 64, generator=generator).requires_grad_()
    labels = torch.randint(0, 512, (150,), generator=generator)
    labels[::7] = -100
    found = []
    for chunked in (True, False):
        hidden.grad = None
        for parameter in network.parameters():
            parameter.grad = None
        if chunked:
            total, count, _ = cross_entropy(network, hidden, labels, z_loss=0.01)
            assert count == int((labels != -100).sum())
        else:
            logits = network.logits(hidden)
            z = logits.logsumexp(-1)[labels != -100]
            total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") + 0.01 * z.square().sum()
        (total / 7).backward()
        assert hidden.grad is not None
        of_head = {name: p.grad for name, p in lora_parameters(network).items() if name.startswith("lm_head")}
        found.append((total.detach(), hidden.grad, of_head))
    (total, gradient, of_head), (expected_total, expected, expected_of_head) = found
    torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert len(of_head) == (0 if settings is None else 3 if settings.dora else 2)
    for name, one in of_head.items():
        torch.testing.assert_close(one, expected_of_head[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_frozen_head_of_another_type_is_never_copied_as_a_whole(monkeypatch: pytest.MonkeyPatch):
    """In bfloat16 by bands: the same bits as with the copy, but for the gradient, which is added up in float32."""
    network = random_network(tiny()).requires_grad_(False)
    hidden = torch.randn(150, 64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    labels = torch.arange(150)
    found = []
    for least in (1 << 30, 4 * 512 * 16):
        monkeypatch.setattr(loss, "BANDED_BYTES", least)
        monkeypatch.setattr(loss, "BAND", 64 * 100)
        hidden.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kind = type(loss.head_of(network.head.weight, network.head, True, torch.bfloat16)).__name__
            total, _, _ = cross_entropy(network, hidden, labels)
        total.backward()
        found.append((kind, total.item(), hidden.grad))
    assert [kind for kind, _, _ in found] == ["PlainHead", "BandedHead"]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert (found[0][2] - found[1][2]).norm() < 0.01 * found[0][2].norm()
    assert type(loss.head_of(network.head.weight, network.head, False, torch.bfloat16)).__name__ == "PlainHead"  # its gradient needs it
