"""The decoder against transformers: logits and gradients of random tiny models, through their files and ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from qwen2.config import ModelConfig
from qwen2.model import Qwen2, load_balancing_loss, packed_attend
from qwen2.weights.checkpoint import SafetensorsSource, split_experts
from qwen2.weights.fill import fill

CPU = torch.device("cpu")


def theirs_like(config: ModelConfig, seed: int = 0) -> torch.nn.Module:
    """A transformers model of the same shape, every parameter random."""
    from transformers import AutoConfig

    values = config.to_hf()
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * (0.5 if name.endswith("bias") else 0.12))
    return theirs.eval()


def our_logits(network: Qwen2, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B, T, V), through the ragged batch."""
    count, length = tokens.shape
    attend = packed_attend(network.config, torch.arange(length).repeat(count), [length] * count)
    return network.logits(network(tokens.flatten(), attend)).unflatten(0, (count, length))


def our_import(folder: Path) -> Qwen2:
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    return fill(config, SafetensorsSource(folder, config), torch.float32, CPU)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(1))  # 100 > 32, YaRN's original context


def test_logits_equal_transformers_through_their_files(shape: ModelConfig, tokens: torch.Tensor, tmp_path: Path):
    theirs = theirs_like(shape)
    theirs.save_pretrained(tmp_path)
    ours = our_import(tmp_path)
    assert ours.config == ModelConfig.from_hf(shape.to_hf())
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours, tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_gradients_equal_transformers(shape: ModelConfig, tokens: torch.Tensor, tmp_path: Path):
    theirs = theirs_like(shape)
    theirs.save_pretrained(tmp_path)
    ours = our_import(tmp_path).requires_grad_()
    for logits in (our_logits(ours, tokens), theirs(tokens).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    seen = 0
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        seen += 1
    assert seen == len(expected)


def test_a_ragged_batch_equals_its_sequences_alone(shape: ModelConfig):
    from tests.conftest import random_network

    network = random_network(shape)
    generator = torch.Generator().manual_seed(2)
    pieces = [torch.randint(0, shape.vocab, (length,), generator=generator) for length in (1, 37, 5, 60)]
    lengths = [len(piece) for piece in pieces]
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        together = network(torch.cat(pieces), packed_attend(shape, positions, lengths))
        alone = torch.cat([network(piece, packed_attend(shape, torch.arange(len(piece)), [len(piece)])) for piece in pieces])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_balance_loss_by_hand(tokens: torch.Tensor):
    from qwen2.config import MoEConfig

    moe = MoEConfig(experts=2, active=1, expert_ffn=1, shared_ffn=1)
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [9.0, -9.0]], requires_grad=True)
    value = load_balancing_loss([logits], moe, torch.tensor([0, 0, 0, -1]))
    p = [[0.880797, 0.119203], [0.731059, 0.268941], [0.047426, 0.952574]]
    share = [2 / 3, 1 / 3]
    mean = [sum(row[e] for row in p) / 3 for e in range(2)]
    assert value.item() == pytest.approx(2 * (share[0] * mean[0] + share[1] * mean[1]), abs=1e-5)
    value.backward()
    # d/dlogit of 2 * sum_e share_e * p_e / 3 = (2 / 3) * p_0 * p_1 * (share_0 - share_1) for expert 0
    assert logits.grad is not None
    assert logits.grad[0, 0].item() == pytest.approx(2 / 3 * 0.880797 * 0.119203 * (share[0] - share[1]), abs=1e-6)
    assert logits.grad[3].abs().sum() == 0


def test_each_row_is_balanced_alone():
    """Rows of 7, 1 and 4 tokens in any order, some left out and one as a whole: the mean of each row's own balance, by its tokens."""
    from qwen2.config import MoEConfig

    moe = MoEConfig(experts=8, active=3, expert_ffn=1, shared_ffn=1)
    layers = [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed), requires_grad=True) for seed in range(3)]
    rows = torch.tensor([3, 0, 0, -1, 3, 0, 0, 1, 0, -1, 0, 3, 0, -1, 3, -1])  # none of row 2 counts
    value = load_balancing_loss(layers, moe, rows)
    parts = [
        len(which) * load_balancing_loss([layer[which] for layer in layers], moe)
        for row in (0, 1, 3)
        if len(which := (rows == row).nonzero()[:, 0])
    ]
    torch.testing.assert_close(value, torch.stack(parts).sum() / 12)
    ours, theirs = torch.autograd.grad(value, layers), torch.autograd.grad(torch.stack(parts).sum() / 12, layers)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("norm_topk", [False, True])
def test_balance_loss_equals_transformers(norm_topk: bool):
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    from qwen2.config import MoEConfig

    moe = MoEConfig(experts=8, active=3, expert_ffn=1, shared_ffn=1, norm_topk=norm_topk)
    layers = tuple(torch.randn(20, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    assert load_balancing_loss(layers, moe).item() == pytest.approx(float(load_balancing_loss_func(layers, 8, 3)), rel=1e-5)


def test_split_experts_gives_the_checkpoint_names(tmp_path: Path):
    stacked = torch.arange(2 * 6 * 4, dtype=torch.float32).view(2, 6, 4)
    pairs = dict(split_experts("model.layers.5.mlp.experts.gate_up_proj", stacked))
    assert list(pairs) == [f"model.layers.5.mlp.experts.{e}.{part}.weight" for e in (0, 1) for part in ("gate_proj", "up_proj")]
    assert torch.equal(pairs["model.layers.5.mlp.experts.1.up_proj.weight"], stacked[1, 3:])
