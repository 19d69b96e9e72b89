"""Batches for training: documents packed end to end into rows of one length, each attended to inside itself only.

A document that reaches a row's end goes on at the start of a later one as a piece of its own, with positions from 0. Every token but
a document's first is a target exactly once: the label of a piece's last token is the document's next token, also where that lies
in a later row; a document's last token, its <|endoftext|>, is a target and has none. Nothing is padded and nothing dropped.

Several documents are open at a time, and rows are cut from each in turn: consecutive pieces of one long document, all of a language
and about one thing, would be a step of their own otherwise, and its gradient would say little about the rest.

The rows are the same for every division of a step into micro-batches and ranks, and their state is a small dict: where the walk over
the documents stands, which of them are open, and how far each is used up.
Left out: the order of documents (mixture.py), and masks inside a document, which fine-tuning brings.

    rows = Rows(order(shards, Mixture(), seed=0), length=512, streams=64)
    batch = pack([next(rows) for _ in range(8)])            # Batch of 8 x 512 tokens
"""

# N tokens of a batch, T length of a row

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # a label that is no target


@dataclass(frozen=True)
class Batch:
    """A ragged batch: tokens (N,) int64, labels (N,) with -100 where none, positions (N,), the pieces' lengths, of sum N, and rows (N,).

    `rows` numbers the row that each token lies in, from 0: what is a row's own is the same in whatever batch the row is.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    rows: Tensor

    @property
    def targets(self) -> int:
        """How many labels count."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch, its tensors on `device`."""
        return Batch(self.tokens.to(device), self.labels.to(device), self.positions.to(device), self.lengths, self.rows.to(device))


@dataclass(frozen=True)
class Row:
    """T tokens of documents laid end to end, with their labels, and how long each piece is."""

    tokens: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64
    lengths: tuple[int, ...]


class Drawn(Protocol):
    """A document in its turn, and where it lies."""

    @property
    def shard(self) -> str: ...

    @property
    def document(self) -> int: ...

    @property
    def ids(self) -> np.ndarray: ...


class Walk(Protocol):
    """An endless walk over documents that can say where it stands and go on from there; mixture.py's is one."""

    def __next__(self) -> Drawn: ...

    def again(self, shard: str, document: int) -> np.ndarray:
        """The ids of a document that was drawn before."""
        ...

    def state(self) -> dict[str, Any]: ...

    def resume(self, state: Mapping[str, Any]) -> Any: ...


@dataclass
class Stream:
    """An open document, and how many of its tokens are used; before the first one, none."""

    shard: str = ""
    document: int = 0
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    used: int = 0


class Rows(Iterator[Row]):
    """Rows of `length` tokens from an endless walk over documents, cut from `streams` of them in turn.

    ValueError where the documents hold no tokens at all.
    """

    def __init__(self, walk: Walk, length: int, streams: int = 1) -> None:
        for name, value, what in (("length", length, "a row has at least 1 token"), ("streams", streams, "at least 1 document is open")):
            if value < 1:
                raise ValueError(f"{name} {value}: {what}")
        self.walk, self.length = walk, length
        self.streams, self.turn = [Stream() for _ in range(streams)], 0

    def __next__(self) -> Row:
        tokens, labels = np.empty(self.length, np.int64), np.full(self.length, IGNORE, np.int64)
        lengths: list[int] = []
        filled = 0
        for ids, start, count in self._pieces():
            following = ids[start + 1 : start + 1 + count]
            tokens[filled : filled + count] = ids[start : start + count]
            labels[filled : filled + len(following)] = following
            lengths.append(count)
            filled += count
        return Row(tokens, labels, tuple(lengths))

    def skip(self) -> None:
        """Pass a row by: what comes then is the same as behind `next`, and no array is made."""
        for _ in self._pieces():
            pass

    def _pieces(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """The pieces of the next row, each a document's ids, where it starts and how long it is; they are used up."""
        room = self.length
        while room:
            stream = self.streams[self.turn]
            if stream.used == len(stream.ids):
                stream = self.streams[self.turn] = self._drawn()
            count = min(room, len(stream.ids) - stream.used)
            yield stream.ids, stream.used, count
            stream.used += count
            room -= count
        self.turn = (self.turn + 1) % len(self.streams)

    def _drawn(self) -> Stream:
        """The next document that has tokens."""
        for _ in range(1_000_000):
            drawn = next(self.walk)
            if len(drawn.ids):
                return Stream(drawn.shard, drawn.document, np.asarray(drawn.ids))
        raise ValueError("a million documents without a token: the shards hold nothing to train on")

    def state(self) -> dict[str, Any]:
        """Where the rows stand, as JSON can hold it."""
        return {
            "walk": self.walk.state(),
            "turn": self.turn,
            "open": [[stream.shard, stream.document, stream.used] for stream in self.streams],
        }

    def resume(self, state: Mapping[str, Any]) -> Rows:
        """Go on from a state; returns itself. ValueError where the documents are not those that the state was taken of."""
        if len(state["open"]) != len(self.streams):
            raise ValueError(f"the data position is one of {len(state['open'])} open documents, there are {len(self.streams)} here")
        self.walk.resume(state["walk"])
        self.turn = int(state["turn"])
        for number, (shard, document, used) in enumerate(state["open"]):
            ids = np.asarray(self.walk.again(shard, document)) if used else Stream().ids
            if used > len(ids):
                raise ValueError(f"the data position lies {used} tokens into a document of {len(ids)}: other shards")
            self.streams[number] = Stream(shard, document, ids, used)
        return self


def pack(rows: Sequence[Row]) -> Batch:
    """Rows end to end, each piece with positions from 0."""
    lengths = tuple(length for row in rows for length in row.lengths)
    ends = np.cumsum(lengths)
    return Batch(  # by numpy alone, on the thread that asks: torch would start threads of its own for it
        torch.from_numpy(np.concatenate([row.tokens for row in rows])),
        torch.from_numpy(np.concatenate([row.labels for row in rows])),
        torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)),
        lengths,
        torch.from_numpy(np.repeat(np.arange(len(rows)), [len(row.tokens) for row in rows])),
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
