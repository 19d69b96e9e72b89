"""Sampling parameters: every refusal's exact words, and how what is left open is resolved."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from qwen2.config import GenerationDefaults
from qwen2.engine.llm import LLM
from qwen2.engine.request import Chunk, Output, SamplingParams, Timings, Usage

REFUSED = [
    ({"temperature": -1}, "temperature -1: must be between 0 (greedy) and 100"),
    ({"temperature": math.nan}, "temperature nan: must be between 0 (greedy) and 100"),
    ({"temperature": True}, "temperature True: must be between 0 (greedy) and 100"),
    ({"temperature": "hot"}, "temperature 'hot': must be between 0 (greedy) and 100"),
    ({"top_k": -1}, "top_k -1: must be 0 (off) or a whole number above it"),
    ({"top_k": 2.5}, "top_k 2.5: must be 0 (off) or a whole number above it"),
    ({"top_p": 0}, "top_p 0: must be above 0 and at most 1 (off)"),
    ({"top_p": 1.01}, "top_p 1.01: must be above 0 and at most 1 (off)"),
    ({"min_p": -0.1}, "min_p -0.1: must be between 0 (off) and 1"),
    ({"min_p": 2}, "min_p 2: must be between 0 (off) and 1"),
    ({"repetition_penalty": 0}, "repetition_penalty 0: must be between 0.01 and 100; 1 is off"),
    ({"repetition_penalty": math.inf}, "repetition_penalty inf: must be between 0.01 and 100; 1 is off"),
    ({"presence_penalty": 2.5}, "presence_penalty 2.5: must be between -2 and 2; 0 is off"),
    ({"penalty_window": -2}, "penalty_window -2: must be -1 (all), or a whole number from 0 (none)"),
    ({"frequency_penalty": -3}, "frequency_penalty -3: must be between -2 and 2; 0 is off"),
    ({"frequency_penalty": "0"}, "frequency_penalty '0': must be between -2 and 2; 0 is off"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias for token -1: must be given by token id, a whole number of at least 0"),
    ({"logit_bias": {"a": 1.0}}, "logit_bias for token 'a': must be given by token id, a whole number of at least 0"),
    ({"logit_bias": {7: math.inf}}, "logit_bias of token 7 inf: must be between -10000 and 10000"),
    ({"seed": 1.5}, "seed 1.5: must be a whole number of 64 bits"),
    ({"seed": 2**63}, "seed 9223372036854775808: must be a whole number of 64 bits"),
    ({"stop": ""}, "stop '': must be a text of at least one character"),
    ({"stop": ["a", 3]}, "stop 3: must be a text of at least one character"),
    ({"stop_token_ids": [-5]}, "stop_token_ids -5: must be token ids, whole numbers of at least 0"),
    ({"stop": b"ab"}, "stop b'ab': must be a text or a list of texts; () is none"),
    ({"stop_token_ids": 5}, "stop_token_ids 5: must be a list of token ids; () is none"),
    ({"stop_token_ids": None}, "stop_token_ids None: must be a list of token ids; () is none"),
    ({"stop_token_ids": "12"}, "stop_token_ids '12': must be a list of token ids; () is none"),
    ({"logit_bias": None}, "logit_bias None: must be a mapping from token ids to numbers; {} is none"),
    ({"logit_bias": [1, 2]}, "logit_bias [1, 2]: must be a mapping from token ids to numbers; {} is none"),
    ({"temperature": 10**400}, "temperature 2**1328...: must be between 0 (greedy) and 100"),
    ({"temperature": -(10**5000)}, "temperature -2**16609...: must be between 0 (greedy) and 100"),
    ({"seed": 10**5000}, "seed 2**16609...: must be a whole number of 64 bits"),
    ({"logit_bias": {7: 10**400}}, "logit_bias of token 7 2**1328...: must be between -10000 and 10000"),
    ({"ignore_eos": 1}, "ignore_eos 1: must be True or False"),
    ({"max_tokens": 0}, "max_tokens 0: must be a whole number of at least 1"),
    ({"max_tokens": "9"}, "max_tokens '9': must be a whole number of at least 1"),
    ({"logprobs": -1}, "logprobs -1: must be a whole number of at least 0"),
    ({"n": 0}, "n 0: must be a whole number from 1 to 128"),
    ({"constraint": "a+"}, "constraint 'a+': must be a Constraint; in settings and JSON, its kind and text"),
    ({"n": 10**6}, "n 1000000: must be a whole number from 1 to 128"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[m.split(":")[0] for _, m in REFUSED])
def test_refusals_name_value_and_limit(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SamplingParams(**values)


def test_equal_parameters_have_one_hash():
    values = {"temperature": 0.5, "stop": ["a"], "stop_token_ids": [1], "logit_bias": {3: 1.0}}
    assert hash(SamplingParams(**values)) == hash(SamplingParams(**values))
    resolved = SamplingParams(**values, seed=1).resolve(GenerationDefaults())
    assert len({resolved, SamplingParams(**values, seed=1).resolve(GenerationDefaults())}) == 1
    assert SamplingParams(logit_bias={3: 1.0}) != SamplingParams(logit_bias={3: 2.0})


def test_unknown_parameter_is_named_with_those_that_exist():
    with pytest.raises(
        ValueError, match=r"^sampling parameter temprature: unknown; there are temperature, top_k, top_p, min_p, .*, constraint$"
    ):
        SamplingParams.from_dict({"temprature": 1, "top_p": 0.5})
    assert SamplingParams.from_dict({"top_p": 0.5, "stop": "x"}) == SamplingParams(top_p=0.5, stop=["x"])


NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")


def test_none_takes_the_models_default_and_zero_does_not():
    defaults = GenerationDefaults(temperature=0.7, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.05, max_tokens=2048)
    used = SamplingParams().resolve(defaults)
    assert [getattr(used, name) for name in NAMES] == [0.7, 20, 0.8, 0.1, 1.05, 2048]
    own = SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, max_tokens=3).resolve(defaults)
    assert [getattr(own, name) for name in NAMES] == [0, 0, 1, 0, 1, 3]


def test_room_bounds_max_tokens():
    assert SamplingParams().resolve(GenerationDefaults(), room=9).max_tokens == 9
    assert SamplingParams(max_tokens=100).resolve(GenerationDefaults(), room=9).max_tokens == 9
    assert SamplingParams(max_tokens=5).resolve(GenerationDefaults(max_tokens=7), room=9).max_tokens == 5


def test_a_drawn_seed_is_reported_and_a_given_one_kept():
    warm = GenerationDefaults(temperature=1.0)
    first, second = SamplingParams().resolve(warm).seed, SamplingParams().resolve(warm).seed
    assert first != second
    assert 0 <= first < 2**53
    assert SamplingParams(seed=0).resolve(warm).seed == 0
    assert SamplingParams().resolve(GenerationDefaults()).seed is None  # greedy draws nothing


def test_what_was_used_can_be_asked_for_again():
    used = SamplingParams(stop="a", logit_bias={3: 1.0}).resolve(GenerationDefaults(temperature=0.5), room=4)
    assert used.resolve(GenerationDefaults(temperature=0.9), room=4) == used


def test_choices_hold_every_sample_and_a_chunk_prints_its_text():
    def output(text, others=()):
        params = SamplingParams().resolve(GenerationDefaults())
        return Output(text, (1,), "stop", Usage(2, 1), params, Timings(0.0, 0.0), others=others)

    whole = output("a", (output("b"), output("c")))
    assert [c.text for c in whole.choices] == ["a", "b", "c"]
    assert whole.choices[0].others == ()
    assert whole.usage.total_tokens == 3
    assert str(Chunk("piece")) == "piece"


@pytest.mark.parametrize("params", [{"temperature": 0}, [SamplingParams()], 5])
def test_parameters_of_another_type_are_refused(params: Any, llm: LLM):
    for call in (llm.chat, llm.stream):
        with pytest.raises(ValueError, match=f"params is a {type(params).__name__}: pass SamplingParams"):
            call([{"role": "user", "content": "a"}], params)
    with pytest.raises(ValueError, match="params is a"):
        llm.generate(["a"], params)
