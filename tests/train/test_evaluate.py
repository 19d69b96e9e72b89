"""Held-out text: the same bytes of it for every tokenizer, from shards and from texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from qwen2.data.batches import Batch
from qwen2.data.shards import Shards, ShardWriter, TokenizerInfo, sha256_of
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.train import Settings, learn
from qwen2.train.changes import FREE, renamed
from qwen2.train.evaluate import as_fit, held_out, held_out_texts
from qwen2.train.stage import PretrainSettings

TEXTS = [("en", "The quick brown fox jumps over the lazy dog. " * 9), ("en", "Some more of it."), ("lo", "ມະນຸດທຸກຄົນເກີດມາມີອິດສະຫຼະ " * 6)]


@pytest.fixture(scope="module")
def tokenizers() -> list[Tokenizer]:
    """Of 266 and of 400 entries: one token stands for 1 byte in the first, for several in the second."""
    return [learn(lambda: TEXTS, Settings(vocab=vocab)).tokenizer for vocab in (266, 400)]


def write(folder: Path, tokenizer: Tokenizer) -> Shards:
    tokenizer.save(folder / "tokenizer")
    end = tokenizer.control["<|endoftext|>"]
    info = TokenizerInfo(sha256_of(folder / "tokenizer" / "tokenizer.json"), tokenizer.vocab_size, end)
    with ShardWriter(folder, info) as writer:
        for number, (language, text) in enumerate(TEXTS):
            writer.add("held-out", language, str(number), tokenizer.encode(text), len(text.encode()))
    return Shards.open(folder)


def text_of(batches: Mapping[str, list[Batch]], tokenizer: Tokenizer) -> dict[str, bytes]:
    return {
        language: b"".join(tokenizer.token_bytes(id) for one in pile for id in one.tokens.tolist() if not tokenizer.is_control(id))
        for language, pile in batches.items()
    }


@pytest.mark.parametrize("most", [100, 408, 10_000])
def test_two_tokenizers_are_measured_on_the_same_text(most: int, tokenizers: list[Tokenizer], tmp_path: Path) -> None:
    coarse, fine = (len(one.encode(TEXTS[0][1])) for one in tokenizers)
    assert coarse > 2 * fine, "so many tokens would be other text"
    found = []
    for one in tokenizers:
        shards = write(tmp_path / str(one.vocab_size), one)
        found.append(text_of(held_out(shards, one, 32, 64, most), one))
        assert text_of(held_out_texts(TEXTS, one, 32, 64, most), one) == found[-1]
    longest = max(len(one.token_bytes(id)) for one in tokenizers for id in range(one.vocab_size))
    for language in ("en", "lo"):
        whole = "".join(text for code, text in TEXTS if code == language).encode()
        short, long = sorted((one[language] for one in found), key=len)
        assert long.startswith(short)
        assert whole[:most].startswith(long)
        assert len(short) > min(most, len(whole)) - longest
    assert most < 10_000 or all(one["en"] == "".join(text for code, text in TEXTS if code == "en").encode() for one in found)


def test_where_the_cut_falls() -> None:
    """Id n stands for n bytes, id 0 ends a document."""
    sizes, documents = np.arange(10), [np.array([3, 4, 0]), np.array([2, 5, 0]), np.array([1, 0])]

    def cut(most: int) -> list[list[int]]:
        return [document.tolist() for document in as_fit(documents, sizes, most)]

    assert cut(2) == []
    assert cut(6) == [[3]]
    assert cut(7) == [[3, 4, 0]]
    assert cut(10) == [[3, 4, 0], [2]], "the third would fit, but is not what comes next"
    assert cut(15) == [[3, 4, 0], [2, 5, 0], [1, 0]]


def test_runs_of_an_earlier_version_can_be_resumed() -> None:
    found, said = renamed({"steps": 4, "eval_tokens": 2000})
    assert found == {"steps": 4, "eval_bytes": 6000}
    assert PretrainSettings(**found).eval_bytes == 6000
    assert said == ["held-out text is cut by bytes: eval_bytes 6,000 in place of eval_tokens 2,000, so not quite as before"]
    assert renamed(found) == (found, [])
    assert {"eval_tokens", "eval_bytes"} <= FREE
