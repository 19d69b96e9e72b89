"""Who runs next: every answer that is being written gets its token, prompts are read in chunks beside them.

A long prompt never stops the answers already running for longer than one chunk, which is shorter while there are any. Who is
admitted: the most important first (a smaller `priority`), of equals whoever came first, as long as a batch has a place and the
cache room for the prompt. A prompt with several samples takes one place; when it was read the others take those that are free, or
wait for theirs like any answer, so that nobody waits for many places at once. Of the prompts being read the one that lacks least
goes first, so that a short one does not wait for a long one; the oldest always has a quarter of the chunk. A prompt whose beginning
another is just reading waits for it and shares it.

When all blocks of the cache are in use the least important answer gives way, of equals the one that came last: its blocks are freed,
and later it reads what it had, with the same bits.

Left out: what a token is (engine.py), and who shares blocks (kv_cache.py).
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qwen2.engine.blocks import BLOCK
from qwen2.engine.draft import MOST_DRAFTED
from qwen2.engine.speculative import TOGETHER

if TYPE_CHECKING:
    from qwen2.engine.answer import Answer
    from qwen2.engine.draft import Draft
    from qwen2.engine.kv_cache import KVCache
    from qwen2.engine.request import Request
    from qwen2.model.adapted import ServedAdapter

BESIDE_ANSWERS = 4  # a chunk is so many times shorter while answers are written, so that none pauses long
OLDEST_SHARE = 4  # one part in so many of a chunk is the oldest prompt's


@dataclass(frozen=True)
class Span:
    """The next `count` tokens of one sequence, the last of which, `guess`, are only proposed (speculative.py)."""

    answer: Answer
    count: int
    guess: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """The ids to read."""
        start = len(self.answer.cache)
        return [*self.answer.tokens[start : start + self.count - len(self.guess)], *self.guess]

    @property
    def is_last(self) -> bool:
        """Whether the model has then seen everything, so that a token follows."""
        return self.count - len(self.guess) == self.answer.unread


class Due(NamedTuple):
    """An answer that gets a token from a row of the step, and one more from each row behind it while its guesses are right."""

    answer: Answer
    row: int
    guess: tuple[int, ...]

    @property
    def rows(self) -> range:
        """Rows of the N that it may get a token from."""
        return range(self.row, self.row + 1 + len(self.guess))


Batch = list[Span]  # one step's work: spans of sequences laid end to end, N tokens together


class Scheduler:
    """Waiting and running answers; both are in the order in which they are served."""

    def __init__(self, cache: KVCache, max_batch: int, chunk: int, guesses: int = 0, draft: Draft | None = None) -> None:
        self.cache, self.guesses, self.draft = cache, guesses, draft
        self.max_batch, self.chunk = max_batch, chunk
        self.waiting: list[Answer] = []
        self.running: list[Answer] = []
        self.preemptions = 0

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return not self.waiting and not self.running

    def add(self, answer: Answer) -> None:
        """Wait until it is this answer's turn."""
        insort(self.waiting, answer, key=rank)

    def next_batch(self) -> Batch:
        """The next tokens of every answer being written, then of prompts until the chunk is full."""
        self._admit()
        batch, budget = Batch(), self.chunk
        writing = [answer for answer in self.running if answer.unread == 1]
        guesses = self._guesses(writing)
        for answer in writing:
            if answer.cache is not None:  # it was not made to give way since
                self._append(batch, answer, 1, guesses.get(answer, ()))
        if batch:
            budget = max(1, self.chunk // BESIDE_ANSWERS)
        self._add_prompts(batch, budget)
        return batch

    def _append(self, batch: Batch, answer: Answer, count: int, guess: tuple[int, ...] = ()) -> None:
        """The answer's next tokens, with blocks for them from whoever is less important; nothing if it has to give way itself."""
        if answer.cache.missing(len(answer.cache) + count + len(guess)) > self.cache.available:
            guess = ()  # for a guess nobody gives way
        total = len(answer.cache) + count + len(guess)
        while self.cache.available < answer.cache.missing(total):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is answer:
                return
            batch[:] = [span for span in batch if span.answer is not victim]
        answer.cache.reserve(total)
        batch.append(Span(answer, count + len(guess), guess))

    def _guesses(self, writing: list[Answer]) -> dict[Answer, tuple[int, ...]]:
        """What may follow the answers, no more than may still be written: found in their own texts, or by a smaller model."""
        running = len(self.running)
        if not self.guesses or not 1 <= running <= TOGETHER:
            return {}
        found = {answer: guess for answer in writing if (guess := answer.guess(self.guesses // running))}
        if self.draft is not None:
            found |= self.draft.guess([answer for answer in writing if answer not in found and answer.begun], MOST_DRAFTED // running)
        return found

    def _preempt(self, answer: Answer) -> None:
        self.running.remove(answer)
        self._leave_draft(answer)
        self.cache.close(answer.cache)
        answer.cache = None  # type: ignore[assignment]
        self.preemptions += 1
        self.add(answer)

    def _leave_draft(self, answer: Answer) -> None:
        if self.draft is not None:
            self.draft.leave(answer)

    def _add_prompts(self, batch: Batch, budget: int) -> None:
        reading = [answer for answer in self.running if answer.unread > 1]
        for answer in reading:
            self.cache.extend(answer.cache, answer.reusable)  # another prompt may have been read this far since
        reading = _distinct(reading)
        parts = _parts(reading, budget)
        for answer in reading:
            count = parts.get(id(answer), 0)
            if count and answer.cache is not None:
                self._append(batch, answer, count)

    def _admit(self) -> None:
        while self.waiting and self._has_place(self.waiting[0]):
            answer = self.waiting[0]
            request, before = answer.request, answer.request.admitted
            request.admitted = time.perf_counter() if before is None else before  # it is this one's fault if it finds no memory
            digest = None if request.adapter is None else request.adapter.digest
            cache = self.cache.open(answer.reusable, reuse=request.shares, adapter=digest)
            spare = len(self.running)  # a block for each, or whoever comes would soon give way again
            if self.running and self.cache.available < cache.missing(len(answer.tokens) + 1) + spare:
                self.cache.close(cache)
                request.admitted = before
                return
            self.waiting.pop(0)
            answer.cache = cache
            insort(self.running, answer, key=rank)
            if before is None:
                request.cached_tokens = len(cache)
                self.cache.asked += len(request.prompt)
                self.cache.hits += len(cache)

    def _has_place(self, answer: Answer) -> bool:
        """Whether a batch has room for one more; the less important give way."""
        while len(self.running) >= self.max_batch:
            if self.running[-1].request.priority <= answer.request.priority:
                return False
            self._preempt(self.running[-1])
        return True

    def due(self, batch: Batch) -> list[Due]:
        """After the forward pass: the answers that get tokens, each with its row of the N. Prompts fork into n samples here."""
        due, row = list[Due](), -1
        for span in batch:
            row += span.count
            is_last, known = span.is_last, span.count - len(span.guess)
            span.answer.cache.advance(span.tokens[:known])
            if is_last and not span.answer.request.only_read and not span.answer.done:
                due.append(Due(span.answer, row - len(span.guess), span.guess))
                due += [Due(fork, row, ()) for fork in self._forks(span.answer)]
        return due

    def _forks(self, answer: Answer) -> list[Answer]:
        request = answer.request
        if request.params.n == 1 or answer.begun or answer.index:
            return []
        forks = answer.siblings()
        for fork in forks:
            is_next = not self.waiting or rank(fork) < rank(self.waiting[0])
            if is_next and len(self.running) < self.max_batch and self.cache.available:
                fork.cache = self.cache.fork(answer.cache)
                insort(self.running, fork, key=rank)
            else:
                self.add(fork)
        return [fork for fork in forks if fork.cache is not None]

    def retire(self) -> list[Request]:
        """Free what has ended, and mark the requests of which nothing goes on any more; the requests concerned."""
        ended = [answer for answer in self.running if answer.done]
        if not ended and not any(answer.done for answer in self.waiting):
            return []
        for answer in ended:
            self._leave_draft(answer)
            if answer.request.error is not None:
                self.cache.discard(answer.cache)
            else:
                self.cache.close(answer.cache, keep=answer.index == 0)
        self.running = [answer for answer in self.running if not answer.done]  # not before all are closed, should that fail
        ended += [answer for answer in self.waiting if answer.done]
        self.waiting = [answer for answer in self.waiting if not answer.done]
        unfinished = {id(answer.request) for answer in (*self.running, *self.waiting)}
        for answer in ended:
            answer.cache = None  # type: ignore[assignment]
            answer.request.finished = id(answer.request) not in unfinished
        if self.idle:
            self.cache.check(())
            if self.draft is not None:
                self.draft.check()
        return [answer.request for answer in ended]

    def fail(self, error: Exception) -> set[Request]:
        """A step broke off: whatever was admitted ends with this error, what waits still waits; those that failed."""
        struck = {answer.request for answer in self.running}
        struck |= {answer.request for answer in self.waiting if answer.request.admitted is not None}
        self.waiting = [answer for answer in self.waiting if answer.request not in struck]
        for request in struck:
            if not request.finished:
                request.error, request.finished = error, True
        self.running = []
        self.cache.reset()  # half-written, and of nobody now
        if self.draft is not None:
            self.draft.reset()
        return struck


def due_rows(due: Sequence[Due]) -> tuple[list[int], list[ServedAdapter | None]]:
    """The rows of the step that tokens come from, and the adapter of each."""
    return [row for one in due for row in one.rows], [one.answer.request.adapter for one in due for _ in one.rows]


def _distinct(reading: list[Answer]) -> list[Answer]:
    """Prompts without those whose next block is just what an earlier one is about to fill: they share it when it is there."""
    begun: set[tuple[int, tuple[int, ...]]] = set()
    distinct = []
    for answer in reading:
        start = len(answer.cache)
        if answer.cache.shared and start % BLOCK == 0 and len(answer.reusable) > start + BLOCK:
            block = answer.cache.chains[-1], tuple(answer.tokens[start : start + BLOCK])
            if block in begun:
                continue
            begun.add(block)
        distinct.append(answer)
    return distinct


def _parts(reading: list[Answer], budget: int) -> dict[int, int]:
    """How many tokens each prompt reads, by id(): the oldest a part of the budget at least, the rest whoever lacks least."""
    parts: dict[int, int] = {}
    for answer in reading[:1]:
        parts[id(answer)] = min(answer.unread, max(1, budget // OLDEST_SHARE))
        budget -= parts[id(answer)]
    for answer in sorted(reading, key=lambda answer: answer.unread):
        have = parts.get(id(answer), 0)
        more = min(answer.unread - have, budget)
        if more > 0:
            parts[id(answer)] = have + more
            budget -= more
    return {id(answer): _whole_blocks(answer, parts[id(answer)]) for answer in reading if id(answer) in parts}


def _whole_blocks(answer: Answer, count: int) -> int:
    """Where a prompt does not end yet, stop at a block's end, so that what others have read may be found there."""
    start = len(answer.cache)
    whole = (start + count) // BLOCK * BLOCK - start
    return whole if whole > 0 and count < answer.unread else count


def rank(answer: Answer) -> tuple[int, int, int, int]:
    """The order in which answers are served."""
    request = answer.request
    return request.priority, request.turn, request.id, answer.index
