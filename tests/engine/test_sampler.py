"""The sampler against transformers' logits processors, against slow lists, and by the statistics of its draws."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2.config import GenerationDefaults
from qwen2.engine.request import SamplingParams
from qwen2.engine.sampler import FIRST_SORTED, Sampled, candidates, draw, keep_top_p, make_sampler

CPU = torch.device("cpu")
VOCAB = 300


def sampler_of(prompt=(), vocab=VOCAB, index=0, **values):
    return make_sampler(SamplingParams(**values).resolve(GenerationDefaults()), list(prompt), vocab, CPU, index)


def random_row(seed, vocab=VOCAB, scale=4.0):
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def together(logits, samplers):
    """A token of each row (R, V), each with its own sampler."""
    sampled = Sampled(logits)
    return [sampled.token(row, sampler) for row, sampler in enumerate(samplers)]


def adjusted(sampler, row):
    """Penalties and bias applied to a copy."""
    row = row.clone()
    if sampler.history is None:
        return sampler.biased(row)
    with sampler.history.penalised(row):
        return sampler.biased(row).clone()


def distribution(sampler, row):
    """What the sampler would draw from, as a dense vector (V,)."""
    logits, ids = candidates(adjusted(sampler, row) / sampler.temperature, sampler.cuts)
    dense = torch.zeros(len(row), dtype=torch.float64)
    dense[torch.arange(len(row)) if ids is None else ids] = logits.double().softmax(-1)
    return dense


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.1, 0.7, 1.0, 1.9]),
        "top_k": st.sampled_from([0, 1, 2, 20, VOCAB, VOCAB + 5]),
        "top_p": st.sampled_from([0.01, 0.5, 0.8, 0.99, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([0.8, 1.0, 1.1]),
    }
)


@settings(max_examples=80, deadline=None)
@given(values=SETTINGS, seed=st.integers(0, 10**6), prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20))
def test_same_distribution_as_transformers(values, seed, prompt):
    row = random_row(seed)
    ids = torch.tensor([prompt])
    theirs = RepetitionPenaltyLogitsProcessor(values["repetition_penalty"])(ids, row[None].clone())
    chain = [TemperatureLogitsWarper(values["temperature"])]
    if values["top_k"]:
        chain.append(TopKLogitsWarper(values["top_k"]))
    if values["top_p"] < 1:
        chain.append(TopPLogitsWarper(values["top_p"]))
    if values["min_p"]:
        chain.append(MinPLogitsWarper(values["min_p"]))
    for step in chain:
        theirs = step(ids, theirs)
    ours = distribution(sampler_of(prompt, **values), row)
    torch.testing.assert_close(ours, theirs[0].double().softmax(-1), rtol=1e-4, atol=1e-7)


def slow_choice(row, prompt, answer, params):
    """The greedy token with every penalty, with lists and loops."""
    scores = row.tolist()
    window = params["penalty_window"]
    if window >= 0:
        prompt, answer = prompt[len(prompt) - max(0, min(len(prompt), window - len(answer))) :], answer[max(0, len(answer) - window) :]
    for token in set(prompt) | set(answer):
        scores[token] = scores[token] / params["repetition_penalty"] if scores[token] > 0 else scores[token] * params["repetition_penalty"]
    for token in set(answer):
        scores[token] -= params["presence_penalty"] + params["frequency_penalty"] * answer.count(token)
    for token, bias in params["logit_bias"].items():
        scores[token] += bias
    return max(range(len(scores)), key=scores.__getitem__)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.lists(st.integers(0, 19), max_size=8),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([-1.0, 0.0, 1.5]),
    frequency=st.sampled_from([-0.5, 0.0, 0.7]),
    bias=st.dictionaries(st.integers(0, 19), st.sampled_from([-3.0, 2.0]), max_size=3),
    window=st.sampled_from([-1, -1, 0, 1, 3, 10, 64]),
)
def test_penalties_over_a_whole_answer_match_lists(seed, prompt, repetition, presence, frequency, bias, window):
    params = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency, "logit_bias": bias}
    params["penalty_window"] = window
    sampler = sampler_of(prompt, vocab=20, temperature=0, **params)
    answer = []
    for step in range(12):
        row = random_row(seed + step, vocab=20, scale=1.0)
        expected = slow_choice(row, prompt, answer, params)
        before = row.clone()
        assert Sampled(row[None]).token(0, sampler) == expected
        assert torch.equal(row, before)  # the model's logits stay as they were, for the log-probabilities
        answer.append(expected)


def test_presence_and_frequency_do_not_look_at_the_prompt():
    row = torch.tensor([3.0, 2.9, 0.0])
    assert sampler_of([0, 0, 0], vocab=3, temperature=0, presence_penalty=2, frequency_penalty=2)(row) == 0
    assert sampler_of([0], vocab=3, temperature=0, repetition_penalty=2.0)(row) == 1


@pytest.mark.parametrize("p", [0.3, 0.9, 0.999])
def test_top_p_on_a_flat_vocabulary_goes_beyond_the_first_sort(p):
    row = random_row(5, vocab=20_000, scale=0.1)
    kept, ids = keep_top_p(row, None, p)
    probabilities = row.double().softmax(-1).sort(descending=True)
    fewest = int((probabilities.values.cumsum(-1) < p).sum()) + 1
    assert len(kept) > FIRST_SORTED
    assert abs(len(kept) - fewest) <= 2  # float32 sums
    assert ids[:FIRST_SORTED].tolist() == probabilities.indices[:FIRST_SORTED].tolist()


def test_draws_follow_the_distribution():
    row = torch.log(torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01]))
    sampler = sampler_of(vocab=6, temperature=1.0, seed=7)
    draws = 20_000
    counts = torch.bincount(torch.tensor([sampler(row) for _ in range(draws)]), minlength=6)
    expected = row.exp() * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # 5 degrees of freedom: one in a thousand exceeds it


def test_draws_after_cuts_return_vocabulary_ids():
    row = torch.full((50,), -20.0)
    row[[41, 7, 30]] = torch.tensor([2.0, 1.9, 1.8])
    sampler = sampler_of(vocab=50, temperature=1.0, top_k=5, top_p=0.99, min_p=0.1, seed=3)
    assert {sampler(row) for _ in range(200)} == {41, 7, 30}


def test_impossible_tokens_are_never_drawn():
    row = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    random = Random(0)
    assert {draw(row, random) for _ in range(500)} == {1, 3}


def test_a_seed_gives_the_same_tokens_on_every_system():
    sampler = sampler_of(vocab=50, temperature=1.0, seed=11)
    row = torch.arange(50) * 0.1
    assert [sampler(row) for _ in range(8)] == [42, 44, 49, 42, 43, 44, 33, 43]


def test_a_seed_gives_the_same_tokens_whatever_the_mates():
    rows = [random_row(step) for step in range(30)]
    alone = sampler_of(temperature=1.0, seed=11)
    expected = [alone(row) for row in rows]
    mates = [sampler_of(temperature=1.3, seed=s, top_k=9) for s in (1, 2)]
    ours = sampler_of(temperature=1.0, seed=11)
    batched = [together(torch.stack([random_row(99), row, random_row(98)]), [mates[0], ours, mates[1]])[1] for row in rows]
    assert batched == expected
    other = sampler_of(temperature=1.0, seed=12)
    assert [other(row) for row in rows] != expected
    second = sampler_of(temperature=1.0, seed=11, index=1)  # sample 1 of n draws differently
    assert [second(row) for row in rows] != expected


@pytest.mark.parametrize("temperature", [1e-30, 1e-8, 1e-3])
def test_the_coldest_temperatures_are_greedy(temperature):
    row = random_row(1)
    assert sampler_of(temperature=temperature, seed=0)(row) == int(row.argmax())


def test_the_hottest_temperature_reaches_everything():
    row = torch.tensor([5.0, 0.0, -5.0])
    sampler = sampler_of(vocab=3, temperature=100, seed=0)
    assert {sampler(row) for _ in range(100)} == {0, 1, 2}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("values", [{"temperature": 0}, {"temperature": 0.8, "top_k": 5}])
def test_a_row_that_is_not_finite_fails_alone(bad, values):
    broken = random_row(0)
    broken[17] = bad
    sampled = Sampled(torch.stack([broken, random_row(1)]))
    with pytest.raises(FloatingPointError, match=r"^logits are (nan|inf)$"):
        sampled.token(0, sampler_of(**values))
    assert sampled.token(1, sampler_of(temperature=0)) == int(random_row(1).argmax())
    with pytest.raises(FloatingPointError, match=r"^logits are -inf$"):
        Sampled(torch.full((1, VOCAB), -math.inf)).token(0, sampler_of(**values))


def test_defaults_of_the_model_reach_the_chain():
    params = SamplingParams(seed=0).resolve(GenerationDefaults(temperature=0.7, top_k=1))
    row = random_row(3)
    assert {make_sampler(params, [], VOCAB, CPU)(row) for _ in range(20)} == {int(row.argmax())}
    greedy = make_sampler(replace(params, temperature=0.0), [], VOCAB, CPU)
    assert greedy.plain
