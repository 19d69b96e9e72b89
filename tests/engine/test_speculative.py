"""Guessed tokens: what is guessed, that no text changes by it, and that it saves steps where a text repeats itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2 import LLM, SamplingParams, kernels
from qwen2.config import tiny
from qwen2.engine.speculative import FIRST, LONGEST, MOST, SHORTEST, TOGETHER, Lookup
from qwen2.weights.export import to_gguf
from tests.conftest import tiny_model

needs_kernels = pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")


def slow_guess(tokens, most):
    """What followed the latest earlier place of the longest ending, found by looking everywhere."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                followed = tokens[end:]
                while len(followed) < most:
                    followed = followed + tokens[end:]
                return tuple(followed[:most])
    return ()


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 8))
def test_the_latest_place_of_the_longest_ending(tokens, most):
    lookup = Lookup()
    for length in range(len(tokens) + 1):
        lookup.length = MOST
        assert lookup.guess(tokens[:length], most) == slow_guess(tokens[:length], most)


def test_guesses_grow_with_success_and_pause_after_failure():
    lookup, text = Lookup(), list(range(100)) * 2 + [0, 1, 2, 3]
    assert lookup.guess(text, MOST) == (4, 5, 6)
    for length in (6, 12, 24, 32, 32):
        lookup.learn_from(1, 1)
        assert len(lookup.guess(text, MOST)) == length
    lookup.learn_from(32, 5)
    assert len(lookup.guess(text, MOST)) == 6
    for pause in (1, 3, 7, 15, 16, 16):
        lookup.learn_from(3, 0)
        assert [lookup.guess(text, MOST) for _ in range(pause)] == [()] * pause
        assert len(lookup.guess(text, MOST)) == FIRST


@pytest.fixture
def path(tmp_path):
    to_gguf(tiny_model(tiny()), tmp_path / "model.gguf", "Q8_0")
    return tmp_path / "model.gguf"


def told(outputs):
    return [(output.token_ids, output.text, output.logprobs, output.finish_reason, output.stopped_by) for output in outputs]


PROMPTS = [[7, 8, 9, 10] * 12, list(range(60)), torch.randint(0, 500, (90,), generator=torch.Generator().manual_seed(1)).tolist()]


@needs_kernels
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=200, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, repetition_penalty=1.1, presence_penalty=0.5, logprobs=3),
        SamplingParams(temperature=0.4, seed=7, top_k=5, max_tokens=150, ignore_eos=True),
        SamplingParams(temperature=0.1, seed=3, n=3, max_tokens=120, ignore_eos=True),
        SamplingParams(temperature=0.05, seed=1, max_tokens=200),
    ],
    ids=["greedy", "penalties", "drawn", "samples", "eos"],
)
def test_no_text_changes(path, params):
    plain, guessing = LLM(path, guesses=0), LLM(path)
    for prompt in PROMPTS:
        ours, theirs = guessing.generate([prompt], params)[0], plain.generate([prompt], params)[0]
        assert told(ours.choices) == told(theirs.choices)
    assert told(guessing.generate(PROMPTS, params)) == told(plain.generate(PROMPTS, params))
    guessing.engine.settle()
    guessing.engine.check()
    assert plain.engine.guessed == 0


@needs_kernels
def test_a_text_that_repeats_itself_takes_fewer_steps(path, monkeypatch):
    llm = LLM(path)
    steps, forward = [], llm.engine.runner.forward
    monkeypatch.setattr(llm.engine.runner, "forward", lambda batch: (steps.append(len(batch)), forward(batch))[1])
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, logit_bias={11: 100.0})
    output = llm.generate([[11, 12] * 20], params)[0]
    assert output.token_ids == (11,) * 200
    assert llm.engine.guessed_right > 150
    assert len(steps) < 30


@needs_kernels
def test_no_more_is_written_than_was_asked_for(path):
    llm = LLM(path, context=128)
    for most in (1, 2, 3, 5, 17):
        params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, logit_bias={11: 100.0})
        assert llm.generate([[11] * 40], params)[0].token_ids == (11,) * most
    full = llm.generate([[11] * 40], SamplingParams(temperature=0, ignore_eos=True, logit_bias={11: 100.0}))[0]
    assert (len(full.token_ids), full.finish_reason) == (88, "length")


@needs_kernels
def test_a_stop_string_in_the_middle_of_a_guess(path):
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logit_bias={65: 100.0})
    llm = LLM(path)
    free = llm.generate([[65] * 40], params)[0]
    stop = free.text[:1] * 7
    cut = llm.generate([[65] * 40], replace(params, stop=stop))[0]
    assert (cut.finish_reason, cut.stopped_by, cut.text) == ("stop", stop, "")
    assert cut.token_ids == LLM(path, guesses=0).generate([[65] * 40], replace(params, stop=stop))[0].token_ids


@needs_kernels
def test_nobody_guesses_in_a_crowd_nor_in_plain_torch(path):
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logit_bias={11: 100.0})
    llm = LLM(path)
    with llm.engine.lock:
        requests = [llm.engine.request([11] * (30 + i), params) for i in range(TOGETHER + 1)]
        for request in requests:
            llm.engine.submit(request)
    llm.engine.settle()
    assert llm.engine.guessed == 0
    plain = LLM(tiny_model())
    plain.generate([[11] * 30], params)
    assert plain.engine.guessed == 0
