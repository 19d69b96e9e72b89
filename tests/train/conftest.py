"""Shards of a few sentences in two languages, and what a small run needs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qwen2.data.shards import Shards, ShardWriter, TokenizerInfo, sha256_of
from tests.conftest import tiny_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "then",
    "some",
    "more",
    "of",
    "it",
    "you",
    "are",
    "a",
    "helpful",
    "assistant",
]


def write_shards(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """English and German documents of unlike lengths, some held out, with the tokenizer beside them."""
    tokenizer, rng = tiny_tokenizer(), random.Random(seed)
    tokenizer.save(folder / "tokenizer")
    info = TokenizerInfo(sha256_of(folder / "tokenizer" / "tokenizer.json"), tokenizer.vocab_size, 509)
    with ShardWriter(folder, info) as writer:
        for number in range(documents):
            language, split = ("de" if number % 3 == 0 else "en"), ("held-out" if number % 10 == 0 else "train")
            text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 40)))
            writer.add(split, language, "words", tokenizer.encode(text), len(text.encode()))
    return folder


@pytest.fixture(scope="session")
def shards_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus") / "shards")


@pytest.fixture
def shards(shards_folder: Path) -> Shards:
    return Shards.open(shards_folder)
