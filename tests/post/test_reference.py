"""Fine-tuning against the reference: trl's batches and transformers' loss and gradients, for the same conversations."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from qwen2.config import MoEConfig, tiny
from qwen2.data.batches import pack
from qwen2.post.rows.records import Example
from qwen2.train.pretrain import next_token_loss
from qwen2.train.world import World
from qwen2.weights.export import to_hf_folder
from tests.conftest import tiny_model
from tests.post.conftest import gathered, small, talk

SHAPES = {
    "dense": tiny(layers=2),
    "tied": tiny(layers=2, tied=True),
    "moe": tiny(layers=2, moe=MoEConfig(experts=4, active=2, expert_ffn=32, shared_ffn=64)),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_loss_and_gradients_of_a_packed_step_are_those_of_trls_padded_batch(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="this trl needs Python 3.11")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = tiny_model(SHAPES[kind])
    to_hf_folder(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rng = random.Random(0)
    examples = [Example(talk(rng, turns), None, "x") for turns in (1, 2, 3, 1)]
    ours = gathered(small(), examples, model).examples

    rows = []
    for index, example in enumerate(examples):
        ids, mask = ours.example(index)
        assert ids == tokenizer.apply_chat_template(example.messages, return_dict=False)
        rows.append({"input_ids": ids, "labels": [id if learned else -100 for id, learned in zip(ids, mask, strict=True)]})
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    assert int((batch["labels"] != -100).sum()) == ours.targets
    loss = theirs(**batch).loss
    loss.backward()

    network = model.network.requires_grad_(True).train()
    step = [pack([ours.row([2, 0])]), pack([ours.row([1, 3])])]
    count, value = sum(one.targets for one in step), 0.0
    for one in step:
        total, _ = next_token_loss(0.0, 0.0, World())(network, one)
        (total / count).backward()
        value += total.item() / count
    assert value == pytest.approx(loss.item(), rel=1e-5)
    named = dict(network.named_parameters())
    compared = 0
    for name, parameter in theirs.named_parameters():
        if name in named and named[name].shape == parameter.shape:
            compared += 1
            torch.testing.assert_close(named[name].grad, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert compared > 15
