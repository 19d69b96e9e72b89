"""Networks whose matrices are packed for the kernels, against the same networks as plain parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen2 import kernels
from qwen2.config import ModelConfig
from qwen2.model import Qwen2, packed_attend
from qwen2.weights.export import to_hf_folder
from qwen2.weights.model import load
from tests.conftest import tiny_model

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
