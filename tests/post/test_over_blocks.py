"""QLoRA: all that training computes over weights in blocks has floating-point inputs, whether a gradient is followed or not.

The engine rounds them to int8, so that its numbers are others by far more than these tests allow.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.config import MoEConfig, tiny
from qwen2.config.lora import LoraSettings
from qwen2.model import Qwen2, packed_attend
from qwen2.model.lora import add_lora
from qwen2.post.adapters import check_device, weights_sha256
from qwen2.post.finetuning.sft import held_out_batches, held_out_loss
from qwen2.post.preference.branches import Group, branch
from qwen2.post.preference.dpo import Data, answer_logprobs, evaluation, pair_loss
from qwen2.post.preference.losses import divergence_of
from qwen2.train.loss import cross_entropy
from qwen2.train.world import World
from qwen2.weights.export import to_gguf
from qwen2.weights.model import load
from tests.conftest import tiny_model
from tests.post.conftest import gathered as sft_gathered
from tests.post.conftest import small as sft_small
from tests.post.test_dpo import gathered, reader, rows, small


@pytest.fixture
def over_blocks(tmp_path: Path) -> Qwen2:
    """A packed network with adapters that still add nothing."""
    to_gguf(tiny_model(), tmp_path / "base.gguf", "Q4_1")
    network = load(tmp_path / "base.gguf", packed=True).network
    add_lora(network, LoraSettings(rank=4), torch.Generator().manual_seed(0))
    return network.train()


@pytest.mark.parametrize("kind", ["tied", "untied", "moe"])
def test_the_weights_hash_is_that_of_whole_tensors(kind: str, tmp_path: Path) -> None:
    """Whether weights are in blocks, unpacked in pieces, or in a folder of float32."""
    moe = MoEConfig(experts=4, active=2, expert_ffn=32, shared_ffn=64) if kind == "moe" else None
    to_gguf(tiny_model(tiny(layers=2, tied=kind == "tied", moe=moe)), tmp_path / "base.gguf", "Q4_1")
    found = []
    for packed in (True, False):
        network = load(tmp_path / "base.gguf", packed=packed).network
        digest = hashlib.sha256()
        for name, tensor in network.tensors():
            digest.update(f"{name} {list(tensor.shape)}".encode() + tensor.detach().float().contiguous().numpy().tobytes())
        assert weights_sha256(network) == digest.hexdigest()
        found.append({name: tensor.detach().float() for name, tensor in network.tensors()})
    assert found[0].keys() == found[1].keys()


def test_no_other_device_computes_over_them(tmp_path: Path) -> None:
    to_gguf(tiny_model(), tmp_path / "base.gguf", "Q4_1")
    for packed in (True, False):
        model = load(tmp_path / "base.gguf", packed=packed)
        check_device(model, torch.device("cpu"))
        if not packed:
            check_device(model, torch.device("cuda:1"))
            continue
        with pytest.raises(
            ValueError, match="weights in blocks are unpacked on the CPU alone, not on cuda:1; leave --qlora or --device out"
        ):
            check_device(model, torch.device("cuda:1"))


def moved(network: Qwen2) -> Qwen2:
    """The same after its adapters learned something."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return network


@pytest.mark.parametrize("kind", ["cache", "adapter"])
def test_before_the_first_step_the_policy_over_blocks_is_its_reference(over_blocks: Qwen2, kind: Any):
    """Both are computed with floating-point inputs: each answer's ratio, which the step sees, is 1."""
    settings = small(reference=kind)
    items = gathered(settings, rows(4)).items
    sums = reader(over_blocks)(items.groups) if kind == "cache" else torch.empty(len(items), 0)
    (batch,) = Data(items, settings, sums, reader(over_blocks)).batches(range(4))
    total, said = pair_loss(settings)(over_blocks, batch)
    assert total.requires_grad
    assert all(parameter.requires_grad for name, parameter in over_blocks.named_parameters() if "lora_" in name)
    for index in range(4):
        (batch,) = Data(items, settings, sums, reader(over_blocks)).batches([index])
        _, said = pair_loss(settings)(over_blocks, batch)
        assert float(said["reward_chosen"].abs() + said["reward_rejected"].abs()) < 1e-5, "beta times a ratio of nats"


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_evaluations_over_blocks_are_those_of_a_step(over_blocks: Qwen2, loss: Any):
    """The same pairs, held out or learned from, have the same loss; so has the divergence."""
    settings = small(loss=loss, micro_batch=6, batch=24)
    items = gathered(settings, rows(6)).items
    data = Data(items, settings, reader(over_blocks)(items.groups), reader(over_blocks))
    moved(over_blocks)
    with torch.no_grad():
        evaluated = evaluation(data, settings, World())(over_blocks)
    batches = data.batches(range(len(items)))
    found = [pair_loss(settings)(over_blocks, batch) for batch in batches]
    assert found[0][0].requires_grad
    assert evaluated["loss"] == pytest.approx(sum(float(value.detach()) for value, _ in found) / len(items), abs=1e-5)
    if loss == "kto":
        groups = [Group(group.prompt, group.answers[1:]) for group in items.groups]
        recorded = answer_logprobs(over_blocks, branch(groups))
        assert recorded.requires_grad
        assert batches[0].divergence == pytest.approx(float(divergence_of(recorded.detach() - data.sums[:, 1])), abs=1e-4)


def test_over_blocks_held_out_rows_are_computed_as_rows_of_a_step(over_blocks: Qwen2):
    network = moved(over_blocks).eval()
    batches = held_out_batches(sft_gathered(sft_small()).examples, sft_small())
    total, count = 0.0, 0
    for batch in batches:
        hidden = network(batch.tokens, packed_attend(network.config, batch.positions, batch.lengths))
        total += float(cross_entropy(network, hidden, batch.labels)[0].detach())
        count += batch.targets
    with torch.no_grad():
        assert held_out_loss(network, batches, World()) == pytest.approx(total / count, rel=1e-6)
