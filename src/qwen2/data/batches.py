"""Batches for training: documents packed end to end into rows of one length, each attended to inside itself only.

A document that reaches a row's end goes on at the start of the next one as a piece of its own, with positions from 0. Every token but
a document's first is a target exactly once: the label of a piece's last token is the document's next token, also where that lies
in the next row; a document's last token, its <|endoftext|>, is a target and has none. Nothing is padded and nothing dropped.

The stream of rows is the same for every division of a step into micro-batches and ranks, and its state is a small dict: where the walk
over the documents stood when it gave the one being cut, and how far that one is used up.
Left out: the order of documents (mixture.py), and masks inside a document, which fine-tuning brings.

    rows = Rows(order(shards, Mixture(), seed=0), length=512)
    batch = pack([next(rows) for _ in range(8)])            # Batch of 8 x 512 tokens
"""

# N tokens of a batch, T length of a row

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # a label that is no target


@dataclass(frozen=True)
class Batch:
    """A ragged batch: tokens (N,) int64, labels (N,) with -100 where none, positions (N,), and the pieces' lengths, of sum N."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    lengths: tuple[int, ...]

    @property
    def targets(self) -> int:
        """How many labels count."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch, its tensors on `device`."""
        return Batch(self.tokens.to(device), self.labels.to(device), self.positions.to(device), self.lengths)


@dataclass(frozen=True)
class Row:
    """T tokens of documents laid end to end, with their labels, and how long each piece is."""

    tokens: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64
    lengths: tuple[int, ...]


class Drawn(Protocol):
    """A document in its turn."""

    @property
    def ids(self) -> np.ndarray: ...


class Walk(Protocol):
    """An endless walk over documents that can say where it stands and go on from there; mixture.py's is one."""

    def __next__(self) -> Drawn: ...

    def state(self) -> dict[str, Any]: ...

    def resume(self, state: Mapping[str, Any]) -> Any: ...


class Rows(Iterator[Row]):
    """Rows of `length` tokens from an endless walk over documents. ValueError where the documents hold no tokens at all."""

    def __init__(self, walk: Walk, length: int) -> None:
        if length < 1:
            raise ValueError(f"length {length}: a row has at least 1 token")
        self.walk, self.length = walk, length
        self.before: dict[str, Any] = walk.state()  # where the walk stood when it gave the document that is being cut
        self.document, self.used = np.empty(0, np.int64), 0

    def __next__(self) -> Row:
        tokens, labels = np.empty(self.length, np.int64), np.full(self.length, IGNORE, np.int64)
        lengths: list[int] = []
        filled = 0
        while filled < self.length:
            if self.used == len(self.document):
                self._take()
            piece = self.document[self.used : self.used + self.length - filled]
            following = self.document[self.used + 1 : self.used + 1 + len(piece)]
            tokens[filled : filled + len(piece)] = piece
            labels[filled : filled + len(following)] = following
            lengths.append(len(piece))
            filled += len(piece)
            self.used += len(piece)
        return Row(tokens, labels, tuple(lengths))

    def _take(self) -> None:
        """The next document that has tokens."""
        for _ in range(1_000_000):
            self.before = self.walk.state()
            self.document, self.used = np.asarray(next(self.walk).ids), 0
            if len(self.document):
                return
        raise ValueError("a million documents without a token: the shards hold nothing to train on")

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON can hold it."""
        return {"walk": self.before, "used": self.used, "open": len(self.document) > 0}

    def resume(self, state: Mapping[str, Any]) -> Rows:
        """Go on from a state; returns itself. ValueError where the documents are not those that the state was taken of."""
        self.walk.resume(state["walk"])
        self.before, self.document, self.used = state["walk"], np.empty(0, np.int64), 0
        if state["open"]:
            self.document, self.used = np.asarray(next(self.walk).ids), int(state["used"])
            if self.used > len(self.document):
                raise ValueError(f"the data position lies {self.used} tokens into a document of {len(self.document)}: other shards")
        return self


def pack(rows: Sequence[Row]) -> Batch:
    """Rows end to end, each piece with positions from 0."""
    lengths = tuple(length for row in rows for length in row.lengths)
    return Batch(
        torch.from_numpy(np.concatenate([row.tokens for row in rows])),
        torch.from_numpy(np.concatenate([row.labels for row in rows])),
        torch.cat([torch.arange(length) for length in lengths]),
        lengths,
    )


def whole_documents(documents: Iterable[np.ndarray], length: int, tokens: int) -> Iterator[Batch]:
    """Documents for evaluation in batches of about `tokens` tokens, each cut into pieces of at most `length`.

    Labels are as in training: a piece's last token has the document's next one, the last token of all has none.
    """
    pieces: list[Row] = []
    count = 0
    for document in documents:
        ids = np.asarray(document).astype(np.int64)
        labels = np.append(ids[1:], IGNORE)
        for start in range(0, len(ids), length):
            piece = Row(ids[start : start + length], labels[start : start + length], (min(length, len(ids) - start),))
            pieces.append(piece)
            count += len(piece.tokens)
            if count >= tokens:
                yield pack(pieces)
                pieces, count = [], 0
    if pieces:
        yield pack(pieces)
