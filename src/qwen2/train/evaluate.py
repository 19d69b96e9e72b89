"""Bits per byte by language on held-out documents: the measure that models of different tokenizers share.

The negative log-likelihood, in bits, of every token but a document's first, over the bytes that these tokens stand for. Control tokens
such as <|endoftext|> stand for none and are left out on both sides. Documents longer than a row are cut as in training. How much text of
a language is taken is counted in bytes, so that it is the same text, to within a token, for every tokenizer.
"""

# N tokens of a batch, V vocabulary

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import log
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qwen2.data.batches import IGNORE, Batch, whole_documents
from qwen2.train.loss import cross_entropy

if TYPE_CHECKING:
    from qwen2.data.shards import Shards
    from qwen2.model import Qwen2
    from qwen2.tokenizer import Tokenizer
    from qwen2.train.world import World

HELD_OUT = "held-out"


def bytes_by_token(tokenizer: Tokenizer) -> Tensor:
    """How many bytes each id stands for (V,), 0 for control tokens."""
    sizes = [0 if tokenizer.is_control(id) else len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)]
    return torch.tensor(sizes, dtype=torch.int64)


def held_out(shards: Shards, tokenizer: Tokenizer, length: int, batch_tokens: int, most: int) -> dict[str, list[Batch]]:
    """Batches of held-out documents by language, of at most `most` bytes of text each; the same ones every time."""
    sizes = bytes_by_token(tokenizer).numpy()
    batches: dict[str, list[Batch]] = {}
    for language in sorted({record.language for record in shards.select(HELD_OUT)}):
        batches[language] = list(whole_documents(as_fit(_documents(shards, language), sizes, most), length, batch_tokens))
    return batches


def held_out_texts(
    texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, length: int, batch_tokens: int, most: int
) -> dict[str, list[Batch]]:
    """The same of (language, text), in a tokenizer's ids."""
    sizes = bytes_by_token(tokenizer).numpy()
    found: dict[str, list[np.ndarray]] = {}
    counts: Counter[str] = Counter()
    for language, text in texts:
        if counts[language] < most:
            found.setdefault(language, []).append(np.asarray(tokenizer.encode(text), dtype=np.int64))
            counts[language] += int(sizes[found[language][-1]].sum())
    return {code: list(whole_documents(as_fit(found[code], sizes, most), length, batch_tokens)) for code in sorted(found)}


def _documents(shards: Shards, language: str) -> Iterator[np.ndarray]:
    """Documents of a language, from all its sources in turn."""
    piles = [shards.documents(record) for record in shards.select(HELD_OUT, language)]
    for turn in range(max(map(len, piles), default=0)):
        for pile in piles:
            if turn < len(pile):
                yield np.asarray(pile[turn])


def as_fit(documents: Iterable[np.ndarray], sizes: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Documents of ids as long as the bytes that they stand for, by `sizes` (V,), fit into `most`; of the last one its first tokens."""
    left = most
    for document in documents:
        ends = np.cumsum(sizes[document])
        fits = document[: int(np.searchsorted(ends, left, side="right"))]
        if len(fits):
            yield fits
        left -= int(ends[len(fits) - 1]) if len(fits) else 0
        if len(fits) < len(document) or left <= 0:
            return


def bits_per_byte(batches: dict[str, list[Batch]], sizes: Tensor, world: World) -> Callable[[Qwen2], dict[str, float]]:
    """The evaluation that the loop calls: bits per byte by language. Every rank computes all of it."""

    def evaluate(network: Qwen2) -> dict[str, float]:
        found = {}
        for language, pile in batches.items():
            bits, size = 0.0, 0
            for whole in pile:
                counted, count = only_text(whole, sizes)
                batch = world.local(counted)
                hidden = network(batch.tokens, world.attend(network.config, batch))
                _, _, sums = cross_entropy(network, hidden, batch.labels)
                bits += float(sums["nll"]) / log(2)
                size += count
            bits = world.sum([bits])[0] / world.data_size
            if size:
                found[language] = bits / size
        return found

    return evaluate


def only_text(batch: Batch, sizes: Tensor) -> tuple[Batch, int]:
    """The batch with the labels alone that stand for bytes, and how many bytes these are."""
    counted = torch.where(batch.labels == IGNORE, 0, sizes[batch.labels.clamp(min=0)])
    labels = torch.where(counted > 0, batch.labels, IGNORE)
    return replace(batch, labels=labels), int(counted.sum())
