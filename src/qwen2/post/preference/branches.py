"""A ragged batch of prompts with several answers each, where a prompt is computed once: the two sides of a pair, k samples, or one.

Tokens lie end to end: a prompt, its answers behind it, the next prompt. Layers see each token once. Attention alone sees whole
sequences, prompt and answer, one for each answer: q, k and v are laid out so for it (rows of a prompt repeat), and of what comes back
each token's own row is taken. A position of an answer begins where the prompt ends, so the numbers are those of separate sequences.

The last token of a prompt says the first one of every answer: a row may be scored more than once.

    batch = branch([Group((1, 2, 3), (Answer((7, 5), (True, True)), Answer((8, 5), (True, True))))])
    hidden = network(batch.tokens, branched_attend(packed_attend(config, batch.positions, batch.lengths), batch))
"""

# N tokens computed, M tokens of whole sequences, n scored, A answers

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.model.attention import Attend


class Answer(NamedTuple):
    """The ids of what follows a prompt, and which of them a model samples."""

    ids: Sequence[int]
    mask: Sequence[int]  # of booleans

    @property
    def length(self) -> int:
        """How many tokens are sampled, and so scored."""
        return sum(self.mask)


class Group(NamedTuple):
    """A prompt, and answers to it."""

    prompt: Sequence[int]
    answers: tuple[Answer, ...]

    @property
    def tokens(self) -> int:
        """How many are computed."""
        return len(self.prompt) + sum(len(answer.ids) for answer in self.answers)

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return len(self.prompt) + max(len(answer.ids) for answer in self.answers)


@dataclass(frozen=True)
class Branches:
    """The batch: what is computed, how attention sees it, what is scored."""

    tokens: Tensor  # (N,)
    positions: Tensor  # (M,)
    lengths: tuple[int, ...]  # of the A sequences, of sum M
    gather: Tensor  # (M,): which of the N tokens stands at each place of the sequences
    places: Tensor  # (N,): a place of each token among them
    rows: Tensor  # (n,): which of the N rows says a scored token
    targets: Tensor  # (n,): that token
    owners: Tensor  # (n,): which answer it is of
    counts: Tensor  # (A,): scored tokens of each answer

    def to(self, device: torch.device | str) -> Branches:
        """The same batch, its tensors on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "lengths"}
        return Branches(lengths=self.lengths, **moved)


def branch(groups: Sequence[Group]) -> Branches:
    """Groups end to end. An empty prompt is a ValueError: nothing would say an answer's first token."""
    tokens: list[int] = []
    gather, places, rows, targets, owners = list[int](), list[int](), list[int](), list[int](), list[int]()
    lengths, counts = list[int](), list[int]()
    for group in groups:
        if not group.prompt:
            raise ValueError("a prompt is empty: an answer's first token needs one before it")
        start = len(tokens)
        shared = range(start, start + len(group.prompt))
        tokens += group.prompt
        places += range(len(gather), len(gather) + len(shared))
        for answer in group.answers:
            own = range(len(tokens), len(tokens) + len(answer.ids))
            tokens += answer.ids
            gather += [*shared, *own]
            places += range(len(gather) - len(own), len(gather))
            said_by = [shared[-1], *own[:-1]] if own else []
            scored = [(row, id) for row, id, sampled in zip(said_by, answer.ids, answer.mask, strict=True) if sampled]
            rows += [row for row, _ in scored]
            targets += [id for _, id in scored]
            owners += [len(lengths)] * len(scored)
            counts.append(len(scored))
            lengths.append(len(shared) + len(own))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Branches(
        torch.tensor(tokens),
        positions,
        tuple(lengths),
        *(torch.tensor(each, dtype=torch.int64) for each in (gather, places, rows, targets, owners, counts)),
    )


def branched_attend(attend: Attend, batch: Branches) -> Attend:
    """Attention for the batch's tokens from one for its whole sequences."""
    if len(batch.gather) == len(batch.tokens):  # an answer a prompt: they are the sequences
        return attend

    def branched(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = (x.index_select(0, batch.gather) for x in (q, k, v))
        return attend(layer, *whole).index_select(0, batch.places)

    return branched
