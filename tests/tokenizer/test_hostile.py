"""Vocabulary files with anything in any place: read, or refused with a ValueError in one line; nothing else."""

from __future__ import annotations

import json
import random

import pytest

from qwen2.tokenizer import ChatTemplate, Tokenizer
from tests.tokenizer.conftest import tiny_parts

JUNK = [None, 5, -1, 1.5, "x", "", [], {}, [None], ["a", 5], {"a": 1}, True, 2**70, [1] * 270, "llama", {"type": "Foo"}, [[1]], "\ud800"]


def mutate(value: object, rng: random.Random, depth: int = 0) -> object:
    """The same data with something else at one place."""
    if rng.random() < 0.15 or depth > 5:
        return rng.choice(JUNK)
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return {**value, key: mutate(value[key], rng, depth + 1)}
    if isinstance(value, list) and value:
        i = rng.randrange(len(value))
        return [*value[:i], mutate(value[i], rng, depth + 1), *value[i + 1 :]]
    return rng.choice(JUNK)


def check(make) -> bool:
    """Whether it was read; what was read must work."""
    try:
        tokenizer = make()
    except ValueError as error:
        complaint = str(error)
    else:
        tokenizer.decode(tokenizer.encode("the other <|im_end|>"))
        ChatTemplate.of(tokenizer)
        return True
    assert "\n" not in complaint
    assert len(complaint) < 500
    return False


@pytest.mark.parametrize("seed", range(4))
def test_gguf_metadata(seed):
    rng = random.Random(seed)
    metadata = Tokenizer(tiny_parts(chat_template="x")).to_gguf(270)
    keys = list(metadata)
    read = [check(lambda: Tokenizer.from_gguf({**metadata, (key := rng.choice(keys)): mutate(metadata[key], rng)})) for _ in range(150)]
    assert 0 < sum(read) < len(read)


@pytest.mark.parametrize("seed", range(4))
def test_a_folder(seed, tmp_path):
    rng = random.Random(seed)
    Tokenizer(tiny_parts(bos=260, add_bos=True)).save(tmp_path)
    originals = {name: json.loads((tmp_path / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    read = []
    for _ in range(100):
        name = rng.choice(list(originals))
        for file, original in originals.items():
            (tmp_path / file).write_text(json.dumps(mutate(original, rng) if file == name else original))
        read.append(check(lambda: Tokenizer.from_folder(tmp_path)))
    assert 0 < sum(read) < len(read)


def test_runs_of_a_million_characters_are_no_trap(tiny):
    """Patterns with nested repeats would take hours here."""
    for text in (" " * 10**6, "a" * 10**6, "\n " * 10**5, "\u0301" * 10**5, "!" * 10**6):
        assert tiny.decode(tiny.encode(text)) == text
