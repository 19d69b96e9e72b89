"""The tokenizer.* keys of GGUF files: read, refused, written and read again."""

from __future__ import annotations

import random
import string

import pytest
from transformers import AutoTokenizer

from qwen2.tokenizer import Tokenizer
from tests.tokenizer.conftest import tiny_parts


@pytest.fixture
def metadata(tiny: Tokenizer) -> dict[str, object]:
    return tiny.to_gguf(300)


def test_written_keys(metadata):
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 300
    assert tokens[256:267] == [
        "th", "the", "er", "Ġt", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "[PAD265]", "[PAD266]",
    ]  # fmt: skip
    assert types[256:267] == [1, 1, 1, 1, 3, 3, 3, 4, 4, 5, 5]
    assert metadata["tokenizer.ggml.merges"] == ["t h", "th e", "e r", "Ġ t"]
    rest = {key.rpartition(".")[2]: value for key, value in metadata.items() if not isinstance(value, list)}
    assert rest == {"model": "gpt2", "pre": "qwen2", "eos_token_id": 262, "padding_token_id": 260, "add_bos_token": False}


def test_written_and_read_again_is_the_same(tiny, metadata):
    again = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": "x"})
    assert again.model_spec() == tiny.model_spec()
    for name in ("control", "special", "eos", "bos", "pad", "add_bos", "vocab_size"):
        assert getattr(again, name) == getattr(tiny, name), name
    assert again.chat_template == "x"
    assert again.to_gguf()["tokenizer.chat_template"] == "x"


def test_the_real_keys_come_back_as_they_were(qwen_metadata, qwen_tokenizer):
    written = qwen_tokenizer.to_gguf(151936)
    for key, value in qwen_metadata.items():
        assert written[key] == (list(value) if not isinstance(value, str | int) else value), key
    assert not any("fim" in token for token in qwen_tokenizer.special)  # shown in answers, though of the control type in the file


def test_too_few_rows_are_refused(tiny):
    with pytest.raises(ValueError, match="264 rows are too few for a vocabulary of 265"):
        tiny.to_gguf(264)


def test_smollm_vocabulary_gives_the_references_ids(smollm_metadata, tmp_path):
    """The digits split and control tokens at ids 0 to 16, checked through the reference library on the files we write."""
    tokenizer = Tokenizer.from_gguf(smollm_metadata)
    assert (tokenizer.vocab_size, tokenizer.eos, len(tokenizer.control)) == (49152, (2, 0), 17)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choice(string.printable + "é中½Ⅷ٣") for _ in range(30))
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert tokenizer.encode("Hello world 2024") == [19556, 905, 216, 34, 32, 34, 36]
    assert max(tokenizer.encode("<|im_end|>")) > 16
    assert tokenizer.to_gguf()["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize("pre", ["qwen2", "gpt-2", "smollm", "llama-bpe"])
def test_split_names_survive(pre, metadata):
    assert Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": pre}).to_gguf()["tokenizer.ggml.pre"] == pre


def test_the_splits_differ_where_they_should(metadata):
    def pieces(pre: str, text: str) -> list[str]:
        split = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": pre})._bpe.pre_tokenizer
        return [piece for piece, _ in split.pre_tokenize_str(text)]

    assert pieces("qwen2", "a 1234 (b") == ["a", "Ġ", "1", "2", "3", "4", "Ġ(", "b"]
    assert pieces("llama-bpe", "a 1234 (b") == ["a", "Ġ", "123", "4", "Ġ(", "b"]
    assert pieces("gpt-2", "a 1234 (b") == ["a", "Ġ1234", "Ġ(", "b"]
    assert pieces("smollm", "a 1234 (b") == ["a", "Ġ", "1", "2", "3", "4", "Ġ(", "b"]
    assert pieces("qwen2", "(b'S") == ["(b", "'S"]
    assert pieces("smollm", "(b'S") == ["(", "b", "'", "S"]


def test_an_unknown_split_cannot_be_written():
    from qwen2.tokenizer.splits import Split, by_pattern

    tokenizer = Tokenizer(tiny_parts(split=Split(None, by_pattern(r"\w"))))
    with pytest.raises(ValueError, match="has no GGUF name; those that can be written are qwen2, gpt-2"):
        tokenizer.to_gguf()


KEY = "tokenizer.ggml."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KEY + "model": "llama"}, "tokenizer.ggml.model is 'llama', a sentencepiece vocabulary; only byte-level BPE"),
        ({KEY + "model": None}, "tokenizer.ggml.model is None, not known"),
        ({KEY + "pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'; the splits known exactly are qwen2, gpt-2, smollm"),
        ({KEY + "pre": None}, "tokenizer.ggml.pre is None"),
        ({KEY + "pre": ["x"]}, "tokenizer.ggml.pre is"),
        ({KEY + "tokens": ["a"]}, "tokenizer.ggml.tokens has 1 entries, tokenizer.ggml.token_type 300"),
        ({KEY + "token_type": None}, "tokenizer.ggml.token_type is missing or not an array"),
        ({KEY + "tokens": "abc"}, "tokenizer.ggml.tokens is missing or not an array"),
        ({KEY + "token_type": [9] * 300}, "entry 0 is 'Ā' of type 9; types go from 1 to 6"),
        ({KEY + "tokens": ["a"] * 300}, "'a' is there twice, at 0 and 1"),
        ({KEY + "merges": ["a b c"]}, "'a b c' is not two tokens with a space between"),
        ({KEY + "merges": ["a b", "c\0 d"]}, "is not two tokens with a space between"),
        ({KEY + "merges": [7]}, "7 is not two tokens"),
        ({KEY + "merges": ["z z"]}, "the merge 'z' \\+ 'z' needs 'zz', which the vocabulary lacks"),
        ({KEY + "eos_token_id": 300}, "tokenizer.ggml.eos_token_id is 300; ids go from 0 to 299"),
        ({KEY + "bos_token_id": "x"}, "tokenizer.ggml.bos_token_id is 'x'"),
        ({"tokenizer.chat_template": 5}, "tokenizer.chat_template is int, not text"),
    ],
)
def test_wrong_keys_are_refused_with_the_reason(metadata, change, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(metadata | change)


def test_a_million_control_tokens_are_refused_before_they_are_looked_at(metadata):
    tokens = ["same"] * 1_000_000
    with pytest.raises(ValueError, match=r"^the vocabulary has 1000000 control tokens; at most 4096 are read$"):
        Tokenizer.from_gguf(metadata | {KEY + "tokens": tokens, KEY + "token_type": [3] * len(tokens)})
