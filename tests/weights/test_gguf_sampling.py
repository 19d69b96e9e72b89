"""Sampling defaults into GGUF metadata and back."""

from __future__ import annotations

import pytest

from qwen2.config import GenerationDefaults, tiny
from qwen2.weights.gguf_sampling import generation_from_gguf, sampling_to_gguf


@pytest.mark.parametrize("window", [-1, 0, 64])
def test_defaults_read_back_as_they_were(window: int) -> None:
    defaults = GenerationDefaults(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1, eos=(5,), penalty_window=window)
    metadata = sampling_to_gguf(defaults)
    assert generation_from_gguf(metadata, tiny(), (5,)) == defaults
    assert ("general.sampling.penalty_last_n" in metadata) == (window != -1)  # all tokens is what is meant where nothing is said


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.sampling.penalty_last_n", -2, "GGUF key general.sampling.penalty_last_n is -2: out of range"),
        ("general.sampling.mirostat", 2, "GGUF key general.sampling.mirostat: this way of sampling is not supported"),
    ],
)
def test_what_cannot_be_read_is_named(key: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generation_from_gguf({key: value}, tiny(), ())
