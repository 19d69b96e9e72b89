"""Prompts computed once for all their answers: log-probabilities and gradients of separate sequences, whatever lies beside them."""

from __future__ import annotations

import random

import pytest
import torch

from qwen2.config import ModelConfig
from qwen2.model import Qwen2, packed_attend
from qwen2.post.preference.branches import Answer, Group, branch, branched_attend
from qwen2.train.logprobs import token_logprobs
from tests.conftest import SHAPES, random_network


def ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(512) for _ in range(count))


def groups(seed: int = 0) -> list[Group]:
    """Two answers, one, three; lengths over several blocks of 64; one answer with a part that nobody samples."""
    rng = random.Random(seed)
    made = []
    for prompt, answers in ((70, (5, 90)), (3, (12,)), (1, (1, 64, 7))):
        made.append(Group(ids(rng, prompt), tuple(Answer(ids(rng, n), (True,) * n) for n in answers)))
    mask = (True, True, False, False, False, True, True)
    made.append(Group(ids(rng, 20), (Answer(ids(rng, 7), mask), Answer(ids(rng, 4), (True,) * 4))))
    return made


def summed(network: Qwen2, made: list[Group]) -> torch.Tensor:
    batch = branch(made)
    attend = branched_attend(packed_attend(network.config, batch.positions, batch.lengths), batch)
    logprobs = token_logprobs(network, network(batch.tokens, attend), batch.rows, batch.targets)
    return torch.zeros(len(batch.counts)).index_add(0, batch.owners, logprobs)


def separate(network: Qwen2, made: list[Group]) -> torch.Tensor:
    """The oracle: each prompt with each answer alone, all logits at once."""
    found = []
    for group in made:
        for answer in group.answers:
            tokens = torch.tensor([*group.prompt, *answer.ids])
            hidden = network(tokens, packed_attend(network.config, torch.arange(len(tokens)), [len(tokens)]))
            logprobs = network.logits(hidden).log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
            found.append(logprobs[len(group.prompt) - 1 :][torch.tensor([bool(sampled) for sampled in answer.mask])].sum())
    return torch.stack(found)


@pytest.mark.parametrize("name", ["dense", "tied", "moe", "yarn"])
def test_log_probabilities_and_gradients_are_those_of_separate_sequences(name: str):
    config: ModelConfig = SHAPES[name]
    made, found = groups(), []
    for compute in (summed, separate):
        network = random_network(config)
        sums = compute(network, made)
        (sums * torch.arange(1.0, len(sums) + 1)).sum().backward()
        found.append((sums.detach(), {key: parameter.grad for key, parameter in network.named_parameters()}))
    (ours, shared), (theirs, alone) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    for key, gradient in alone.items():
        assert gradient is not None
        scale = float(gradient.abs().max())
        torch.testing.assert_close(shared[key], gradient, rtol=1e-3, atol=1e-4 * scale, msg=lambda text, key=key: f"{key}: {text}")


def test_a_prompt_is_computed_once():
    made = groups()
    batch = branch(made)
    assert len(batch.tokens) == sum(group.tokens for group in made) == 70 + 95 + 15 + 73 + 31
    assert batch.lengths == (75, 160, 15, 2, 65, 8, 27, 24)
    assert batch.counts.tolist() == [5, 90, 12, 1, 64, 7, 4, 4]
    assert batch.tokens[batch.gather][batch.places].tolist() == batch.tokens.tolist()
    assert batch.gather[batch.places].tolist() == list(range(len(batch.tokens)))


def test_what_one_answer_says_changes_no_bit_of_another():
    network = random_network(SHAPES["dense"])
    made = groups()
    other = Answer(tuple((id + 1) % 512 for id in made[0].answers[0].ids), made[0].answers[0].mask)
    changed = [made[0]._replace(answers=(other, made[0].answers[1])), *made[1:]]
    with torch.enable_grad():
        first, second = summed(network, made), summed(network, changed)
    assert first[0] != second[0]
    assert torch.equal(first[1:], second[1:])


def test_single_answers_need_no_second_layout():
    batch = branch([group._replace(answers=group.answers[:1]) for group in groups()])

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q

    assert branched_attend(attend, batch) is attend


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt is empty"):
        branch([Group((), (Answer((1,), (True,)),))])
