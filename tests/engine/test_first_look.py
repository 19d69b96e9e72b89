"""Held to a form, the likeliest token is looked at before all of them are: the same token, and seldom more than that look."""

from __future__ import annotations

import pytest
import torch

from qwen2 import SamplingParams
from qwen2.config import GenerationDefaults
from qwen2.engine.grammar import Grammars
from qwen2.engine.sampler import make_sampler
from tests.engine.conftest import EOS, byte_tokenizer
from tests.engine.test_grammar import FORMS, V, random_rows


@pytest.fixture(scope="module")
def grammars():
    return Grammars(byte_tokenizer(), V)


@pytest.mark.parametrize(
    "values", [{"repetition_penalty": 1.4}, {"logit_bias": {48: 3.0}}, {"frequency_penalty": 0.7, "penalty_window": 5}]
)
@pytest.mark.parametrize("name", FORMS)
def test_the_likeliest_token_is_looked_at_before_all_are(grammars, monkeypatch, name, values):
    """With penalties and biases too: the token is the one that a look at all of them gives, which is seldom needed."""

    def written(rows, slow):
        params = SamplingParams(temperature=0, **values).resolve(GenerationDefaults())
        matcher = grammars.compiled(FORMS[name]).matcher([EOS])
        looks, narrow = [], matcher.narrow
        monkeypatch.setattr(matcher, "narrow", lambda row: looks.append(row) or narrow(row))
        if slow:
            monkeypatch.setattr(matcher, "surely_allows", lambda token: False)
        sampler, tokens = make_sampler(params, [48, 49], V, torch.device("cpu"), matcher=matcher), []
        for row in rows:
            tokens.append(sampler(row.clone()))
            if tokens[-1] == EOS or sampler.complete:
                break
        return tokens, len(looks)

    for seed in range(4):
        rows = [row for row, _ in zip(random_rows(seed), range(60), strict=False)]
        right, looks = written(rows, slow=True)
        assert looks == len(right)
        for token, row in zip(right, rows, strict=False):
            row[token] += 100.0 * (seed > 0)  # a model that mostly writes what is allowed
        assert written(rows, slow=False)[0] == written(rows, slow=True)[0]
        if seed > 0:
            assert written(rows, slow=False)[1] <= 1 + (EOS in right)
