"""Vocabularies for the tokenizer's tests: the real one, and a tiny one that needs no download."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from qwen2.tokenizer import ChatTemplate, Limits, Parts, Tokenizer
from qwen2.tokenizer.alphabet import CHAR_OF_BYTE
from qwen2.weights.gguf import GGUFFile

DATA = Path(__file__).with_name("data")
TINY_CONTROL = {"<|endoftext|>": 260, "<|im_start|>": 261, "<|im_end|>": 262, "<tool_call>": 263, "</tool_call>": 264}


def tiny_parts(**changes: object) -> Parts:
    """All bytes, four merges, five control tokens."""
    vocab = {CHAR_OF_BYTE[byte]: byte for byte in range(256)} | {"th": 256, "the": 257, "er": 258, "Ġt": 259}
    merges = [("t", "h"), ("th", "e"), ("e", "r"), ("Ġ", "t")]
    fields = {"vocab": vocab, "merges": merges, "control": TINY_CONTROL, "eos": (262, 260), "pad": 260} | changes
    return Parts(**fields)


def with_jinja(tokenizer: Tokenizer, source: str | None, limits: Limits | None = None) -> ChatTemplate:
    """The tokenizer's own template replaced."""
    before, tokenizer.chat_template = tokenizer.chat_template, source
    template = ChatTemplate.of(tokenizer, limits=limits)
    tokenizer.chat_template = before
    return template


@pytest.fixture
def tiny() -> Tokenizer:
    return Tokenizer(tiny_parts())


@pytest.fixture(scope="session")
def qwen_metadata(coder: Path) -> dict[str, object]:
    """The tokenizer's keys of the real model's GGUF file."""
    return _metadata(coder)


@pytest.fixture(scope="session")
def smollm_metadata(smollm: Path) -> dict[str, object]:
    return _metadata(smollm)


def _metadata(path: Path) -> dict[str, object]:
    with GGUFFile.open(path) as file:
        metadata: Mapping[str, object] = file.metadata
        return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def reference(qwen_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    """transformers' own Qwen2 tokenizer over the same vocabulary."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("qwen")
    qwen_tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def udhr() -> dict[str, list[str]]:
    """Paragraphs in 29 languages."""
    lines = gzip.decompress((DATA / "udhr.jsonl.gz").read_bytes()).decode().splitlines()
    return {entry["code"]: entry["paragraphs"] for entry in map(json.loads, lines)}
