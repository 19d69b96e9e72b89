"""A tiny random model with a byte-level vocabulary, and an engine that is checked after every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2.config import GenerationDefaults, tiny
from qwen2.engine.llm import LLM
from qwen2.tokenizer import ChatTemplate, Parts, Tokenizer
from qwen2.tokenizer.alphabet import CHAR_OF_BYTE
from qwen2.weights.model import Model
from tests.conftest import random_network

CONTROL = {"<|endoftext|>": 300, "<|im_start|>": 301, "<|im_end|>": 302, "<tool_call>": 303, "</tool_call>": 304}
EOS = 302


def byte_tokenizer() -> Tokenizer:
    """One token for each byte (ids 0 .. 255), five control tokens, and a hole between them that stands for nothing."""
    return Tokenizer.from_parts(Parts({char: byte for byte, char in CHAR_OF_BYTE.items()}, [], CONTROL, eos=(EOS,), pad=300))


def byte_model(generation: GenerationDefaults | None = None, seed: int = 0, **changes: Any) -> Model:
    """Greedy by default; 512 rows, of which the tokenizer knows 305: the rest are padding."""
    config = tiny(eos=(EOS,), bos=None, **changes)
    tokenizer = byte_tokenizer()
    generation = GenerationDefaults(eos=(EOS,)) if generation is None else generation
    network = random_network(config, seed)
    return Model(config, tokenizer, ChatTemplate.of(tokenizer), generation, network, "tiny", Path("tiny"), "float32")


@pytest.fixture(scope="session")
def model() -> Model:
    return byte_model()


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    """LLM with the given arguments; at the end nothing may still run and every sequence must be accounted for."""
    made: list[LLM] = []

    def make(*args: Any, **values: Any) -> LLM:
        made.append(LLM(*args, **values))
        return made[-1]

    yield make
    for llm in made:
        llm.engine.settle()
        llm.engine.check()


@pytest.fixture
def llm(make_llm: Callable[..., LLM], model: Model) -> LLM:
    return make_llm(model)
