"""Guesses by a smaller model of the same tokens (arXiv:2211.17192, 2302.01318): it writes ahead, the larger one checks (speculative.py).

The draft reads what the answers consist of, in a cache of its own, on the engine's thread and for all answers in one step, and
writes its likeliest tokens behind them. It is only asked where prompt lookup finds nothing. It counts what it costs: it goes on
while its tokens are likely enough to be right, reads a prompt only when the answer has become long enough to pay for that, and
leaves an answer that has lost by it: to come back it would have to read all that was written since. A token that was checked and
right is in its cache already; of those that were wrong nothing is counted in, and what comes is written over them.

Left out: drawing from the draft's distribution; the larger model's own choice decides in any case.
"""

# R answers, V vocabulary without padding rows

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen2.engine.kv_cache import common_prefix
from qwen2.engine.sampler import largest

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.engine.answer import Answer
    from qwen2.engine.kv_cache import BlockSequence, KVCache
    from qwen2.engine.runner import Runner

# Measured with the models of 1.5B and 0.5B on two Zen 4 cores: a step of the larger takes 36 ms, of the smaller 17; with 2, 3, 4, 5
# and 8 tokens 37, 40, 42, 47 and 72, the smaller's with 8 tokens 31.
MOST_DRAFTED = 4  # tokens ahead, of all answers together
CHECK = 0.08  # what one more token to be checked costs the larger model, in its steps
OVERHEAD = 1.2  # a step's time beyond its weights' share
READ = 8  # tokens of a text that the draft reads in the time of one step
EARNED = 4  # tokens of a prompt that it may read for each that was written
AT_ONCE = 128  # tokens that it reads at most between two steps, so that none waits long
DEBT, CREDIT = 2.0, 3.0  # steps that an answer may lose by it, and that gains may make up for later


class Follower:
    """One answer as the draft has it: what it has read, what it has written ahead, and what that has brought."""

    def __init__(self, sequence: BlockSequence) -> None:
        self.sequence = sequence
        self.ahead: tuple[int, ...] = ()  # guesses whose keys and values lie behind the sequence's end, not counted in
        self.balance = 0.0  # in steps of the larger model

    def learn_from(self, offered: int, right: int) -> None:
        """So many of the guesses were right: each has saved a step."""
        self.pay(CHECK * offered - right)

    def pay(self, steps: float) -> None:
        """So many steps were lost."""
        self.balance = min(CREDIT, self.balance - steps)

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Count in what was guessed right."""
        start = len(self.sequence)
        right = common_prefix(self.ahead, tokens[start : start + len(self.ahead)])
        self.sequence.advance(self.ahead[:right])
        self.ahead = ()


class Ahead:
    """A sequence with some more tokens behind it, as attention sees it."""

    def __init__(self, sequence: BlockSequence, more: int) -> None:
        self.addresses, self.memory = sequence.addresses, sequence.memory
        self._length = len(sequence) + more

    def __len__(self) -> int:
        return self._length


class Draft:
    """The smaller model at work for all answers of an engine, whose vocabulary has `vocab` tokens, and `weights` bytes."""

    def __init__(self, runner: Runner, cache: KVCache, vocab: int, weights: int) -> None:
        self.runner, self.cache = runner, cache
        self.cost = OVERHEAD * runner.network.weight_bytes() / weights  # of a step, in steps of the larger model: all weights are read
        self.vocab, self.window = min(vocab, runner.network.config.vocab), runner.network.config.window
        self.followers: dict[Answer, Follower] = {}
        self.left: set[Answer] = set()  # those that lost by it

    def guess(self, answers: Sequence[Answer], most: int) -> dict[Answer, tuple[int, ...]]:
        """What may follow the answers, at most `most` tokens each, fewer where it is not sure; nothing for some."""
        going = [(answer, follower) for answer in answers if (follower := self._follow(answer, most)) is not None]
        if not going:
            return {}
        counts = [min(len(answer.tokens) - len(follower.sequence), AT_ONCE // len(going)) for answer, follower in going]
        logits = self._read_on(going, counts)
        found: dict[Answer, list[int]] = {}
        chances: dict[Answer, float] = {}
        going = [pair for pair in going if len(pair[1].sequence) == len(pair[0].tokens)]
        while going:
            going = self._choose(going, logits, found, chances, most)
            if going:
                last = [found[answer][-1] for answer, _ in going]
                spans = [(Ahead(follower.sequence, len(follower.ahead)), 1) for _, follower in going]
                logits = self._logits(self.runner.read(last, spans), list(range(len(last))))
                for (_, follower), token in zip(going, last, strict=True):
                    follower.ahead = (*follower.ahead, token)
        for answer in found:
            answer.guesser = self.followers[answer]
        return {answer: tuple(tokens) for answer, tokens in found.items()}

    def _follow(self, answer: Answer, most: int) -> Follower | None:
        """The answer's follower where it may guess now, with blocks for all that it will write."""
        if answer in self.left:
            return None
        follower = self.followers.get(answer)
        if follower is None:
            follower = self.followers[answer] = Follower(self.cache.open(answer.tokens))
        follower.catch_up(answer.tokens)
        if follower.balance < -DEBT:
            self.leave(answer)
            self.left.add(answer)
            return None
        total, behind = len(answer.tokens) + most, len(answer.tokens) - len(follower.sequence)
        if behind > max(READ, EARNED * answer.written) or total > self.window or answer.room < 1:
            return None
        if follower.sequence.missing(total) > self.cache.available:
            return None
        follower.sequence.reserve(total)
        if len(follower.sequence) >= len(answer.request.prompt):  # the prompt was earned
            follower.pay(self.cost * (behind - 1) / READ)
        return follower

    def _read_on(self, going: Sequence[tuple[Answer, Follower]], counts: Sequence[int]) -> Tensor:
        """Read the texts' next tokens; logits (R, V) of those that were read to their end."""
        tokens, rows, row = list[int](), list[int](), -1
        for (answer, follower), count in zip(going, counts, strict=True):
            start = len(follower.sequence)
            tokens += answer.tokens[start : start + count]
            row += count
            if start + count == len(answer.tokens):
                rows.append(row)
        x = self.runner.read(tokens, [(follower.sequence, count) for (_, follower), count in zip(going, counts, strict=True)], rows)
        for (answer, follower), count in zip(going, counts, strict=True):
            start = len(follower.sequence)
            follower.sequence.advance(answer.tokens[start : start + count])
        return self._logits(x, rows) if rows else x

    def _choose(
        self,
        going: Sequence[tuple[Answer, Follower]],
        logits: Tensor,
        found: dict[Answer, list[int]],
        chances: dict[Answer, float],
        most: int,
    ) -> list[tuple[Answer, Follower]]:
        """Add the likeliest token to each guess that it is worth checking in; those for which another may be worth its cost."""
        best, peaks = largest(logits)
        sums = logits.logsumexp(-1).tolist()
        further: list[tuple[Answer, Follower]] = []
        for (answer, follower), token, peak, total in zip(going, best, peaks, sums, strict=True):
            follower.pay(self.cost)
            chance = chances.get(answer, 1.0) * math.exp(peak - total)  # that all so far are right; false below of a NaN
            if chance >= CHECK:
                found.setdefault(answer, []).append(token)
                chances[answer] = chance
                if chance >= CHECK + self.cost and len(found[answer]) < min(most, answer.room):
                    further.append((answer, follower))
        return further

    def _logits(self, x: Tensor, rows: list[int]) -> Tensor:
        return self.runner.logits(x, rows)[:, : self.vocab]

    def leave(self, answer: Answer) -> None:
        """An answer has ended, given way, or lost by it."""
        self.left.discard(answer)
        follower = self.followers.pop(answer, None)
        if follower is not None:
            follower.catch_up(answer.tokens)
            self.cache.close(follower.sequence)

    def reset(self) -> None:
        """Forget everything."""
        self.followers, self.left = {}, set()
        self.cache.reset()

    def check(self) -> None:
        """Every block is accounted for; RuntimeError names what is not."""
        self.cache.check(follower.sequence for follower in self.followers.values())
