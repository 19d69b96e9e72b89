"""Bits per byte by language on held-out documents: the measure that models of different tokenizers share.

The negative log-likelihood, in bits, of every token but a document's first, over the bytes that these tokens stand for. Control tokens
such as <|endoftext|> stand for none and are left out on both sides. Documents longer than a row are cut as in training.
"""

# N tokens of a batch, V vocabulary

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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


def held_out(shards: Shards, length: int, batch_tokens: int, most: int) -> dict[str, list[Batch]]:
    """Batches of held-out documents by language, of at most about `most` tokens each; the same ones every time."""
    batches: dict[str, list[Batch]] = {}
    for language in sorted({record.language for record in shards.select(HELD_OUT)}):
        batches[language] = list(whole_documents(_documents(shards, language, most), length, batch_tokens))
    return batches


def held_out_texts(
    texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, length: int, batch_tokens: int, most: int
) -> dict[str, list[Batch]]:
    """The same of (language, text), in a tokenizer's ids."""
    found: dict[str, list[np.ndarray]] = {}
    counts: Counter[str] = Counter()
    for language, text in texts:
        if counts[language] < most:
            document = np.asarray(tokenizer.encode(text)[: most - counts[language]], dtype=np.int64)
            found.setdefault(language, []).append(document)
            counts[language] += len(document)
    return {language: list(whole_documents(found[language], length, batch_tokens)) for language in sorted(found)}


def _documents(shards: Shards, language: str, most: int) -> Iterator[np.ndarray]:
    """Documents of a language from all its sources in turn, until they have `most` tokens."""
    piles = [shards.documents(record) for record in shards.select(HELD_OUT, language)]
    count = 0
    for turn in range(max(map(len, piles), default=0)):
        for pile in piles:
            if turn >= len(pile):
                continue
            document = np.asarray(pile[turn])[: most - count]
            if not len(document):
                return
            count += len(document)
            yield document


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
    return Batch(batch.tokens, labels, batch.positions, batch.lengths), int(counted.sum())
