"""The trainer and the sampler agree: log-probabilities of the training forward pass and of the engine are equal, in float32 to 1e-5.

The trainer's are those of a batch as DPO makes it, prompts shared and answers side by side, with gradients recorded; the engine's are
`LLM.score` of the text and what it said of each token as it sampled it, several at a time and some from prompts that it had read before.
So the ratio of the two probabilities of a fresh sample is 1.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from qwen2.config import ModelConfig
from qwen2.config.lora import LoraSettings
from qwen2.engine.llm import LLM
from qwen2.engine.request import SamplingParams
from qwen2.model import Qwen2, packed_attend
from qwen2.model.lora import add_lora
from qwen2.post.preference.branches import Answer, Group, branch, branched_attend
from qwen2.train.logprobs import token_logprobs
from qwen2.weights.export import to_hf_folder
from qwen2.weights.model import Model
from tests.conftest import SHAPES, tiny_model

CLOSE = {"rtol": 0.0, "atol": 1e-5}
PROMPTS = [[5, 6, 7], [9] * 20, list(range(100, 170)), [5, 6, 8]]  # of one block of the cache and of two; two begin alike


def sampled(llm: LLM, temperature: float = 1.0, tokens: int = 24) -> tuple[list[Group], torch.Tensor]:
    """Prompts with three answers each, drawn together; and what the engine said of each token, end to end."""
    params = SamplingParams(temperature=temperature, top_k=0, top_p=1, repetition_penalty=1, max_tokens=tokens, logprobs=0, seed=3, n=3)
    outputs = [(output, *output.others) for output in llm.generate(PROMPTS, replace(params, ignore_eos=True))]
    groups = [
        Group(prompt, tuple(Answer(one.token_ids, [True] * len(one.token_ids)) for one in answers))
        for prompt, answers in zip(PROMPTS, outputs, strict=True)
    ]
    return groups, torch.tensor([token.logprob for answers in outputs for one in answers for token in one.logprobs or ()])


def scored(llm: LLM, groups: list[Group]) -> torch.Tensor:
    """Of each answer's tokens, all texts in one call."""
    texts = [[*group.prompt, *answer.ids] for group in groups for answer in group.answers]
    starts = [len(group.prompt) for group in groups for _ in group.answers]
    return torch.tensor([p for found, start in zip(llm.score(texts), starts, strict=True) for p in found[start:]])


def trained(network: Qwen2, groups: list[Group]) -> torch.Tensor:
    """What a training step computes them as: with gradients, all answers in one batch."""
    batch = branch(groups)
    network.requires_grad_(True)
    with torch.enable_grad():
        attend = branched_attend(packed_attend(network.config, batch.positions, batch.lengths), batch)
        found = token_logprobs(network, network(batch.tokens, attend), batch.rows, batch.targets)
    assert found.requires_grad
    network.requires_grad_(False)
    return found.detach()


def agree(llm: LLM, network: Qwen2, temperature: float = 1.0) -> None:
    groups, theirs = sampled(llm, temperature)
    ours = trained(network, groups)
    assert len(ours) == len(PROMPTS) * 3 * 24
    assert len({tuple(answer.ids) for group in groups for answer in group.answers}) > 10
    torch.testing.assert_close(theirs, ours, **CLOSE)
    torch.testing.assert_close(scored(llm, groups), ours, **CLOSE)
    torch.testing.assert_close((theirs - ours).exp(), torch.ones(len(ours)), **CLOSE)
    alone = torch.cat([trained(network, [groups[0]._replace(answers=(one,))]) for one in groups[0].answers])
    torch.testing.assert_close(alone, ours[: len(alone)], **CLOSE)


@pytest.mark.parametrize("name", SHAPES)
def test_the_trained_network_in_the_engine(name: str):
    """The engine over the very network that is trained: nothing is copied."""
    model = tiny_model(SHAPES[name])
    agree(LLM(model), model.network)


@pytest.mark.parametrize("name", ["dense", "tied", "moe", "yarn"])
def test_exported_float32_weights_in_the_kernels(name: str, tmp_path: Path):
    """The model as it is served, its matrices packed: with keys and values kept as floats nothing is rounded on the way."""
    model = tiny_model(SHAPES[name])
    to_hf_folder(model, tmp_path / "model", dtype=torch.float32)
    llm = LLM(tmp_path / "model", dtype="float32", cache_bits=32)
    agree(llm, model.network)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_at_any_temperature(temperature: float):
    """What the engine says of a token is the model's probability, before temperature: the one that is trained."""
    model = tiny_model()
    agree(LLM(model), model.network, temperature)


def test_with_adapters():
    """Policy and sampler are the base and its adapter, not merged."""
    model = tiny_model()
    add_lora(model.network, LoraSettings(rank=4), torch.Generator().manual_seed(0))
    plain = LLM(tiny_model())
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    llm = LLM(model)
    agree(llm, model.network)
    groups, theirs = sampled(llm)
    assert (scored(plain, groups) - theirs).abs().max() > 1e-2


def test_a_step_later_they_agree_again():
    """A sampler of the weights after an update: what it says of the answers from before, and of its own."""
    model = tiny_model()
    groups, before = sampled(LLM(model))
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(1.01)
    fresh = LLM(model)
    torch.testing.assert_close(scored(fresh, groups), trained(model.network, groups), **CLOSE)
    assert (scored(fresh, groups) - before).abs().max() > 1e-3
    agree(fresh, model.network)


def test_the_real_model_in_float32(smollm: Path, tmp_path: Path):
    """SmolLM2-135M: its logits reach 30, of which 1e-5 is the third of a unit in the last place that thirty layers leave; relative to
    them the two agree to 1e-5."""
    from qwen2.weights.model import load

    model = load(smollm, dtype="float32")
    check = partial(torch.testing.assert_close, rtol=0.0, atol=1e-5 * 30)
    for llm in (LLM(model), LLM(export(model, tmp_path / "model"), dtype="float32", cache_bits=32)):
        groups, theirs = sampled(llm, tokens=6)
        ours = trained(model.network, groups)
        check(theirs, ours)
        check(scored(llm, groups), ours)


def export(model: Model, folder: Path) -> Path:
    to_hf_folder(model, folder, dtype=torch.float32)
    return folder


def test_a_cache_of_32_bits_is_floats(tiny_folder: Path, tiny_config: ModelConfig):
    llm = LLM(tiny_folder, cache_bits=32)
    assert llm.engine.runner.token_bytes == 2 * 4 * tiny_config.layers * tiny_config.kv_heads * tiny_config.head_dim
    with pytest.raises(ValueError, match="cache_bits 24: must be 32, 16 or 8"):
        LLM(tiny_folder, cache_bits=24)
