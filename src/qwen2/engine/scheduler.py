"""Who runs next: every answer that is being written gets one token a step, prompts are read in chunks beside them.

A long prompt therefore never stops the answers already running for longer than one chunk. Requests are admitted in the order
in which they came, as long as a batch has room for all their samples.

Left out: priorities and preemption; memory is bounded by the number of sequences times the window.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from qwen2.engine.answer import Answer
from qwen2.engine.kv_cache import AnySequence, KVCache
from qwen2.engine.request import Request

MakeAnswer = Callable[[Request, int, AnySequence], Answer]


@dataclass(frozen=True)
class Span:
    """The next `count` tokens of one sequence."""

    answer: Answer
    count: int

    @property
    def tokens(self) -> list[int]:
        """The ids to read."""
        start = len(self.answer.cache)
        return self.answer.tokens[start : start + self.count]

    @property
    def is_last(self) -> bool:
        """Whether the model has then seen everything, so that a token follows."""
        return self.count == self.answer.unread


Batch = list[Span]  # one step's work: spans of sequences laid end to end, N tokens together


class Scheduler:
    """Waiting requests and running answers."""

    def __init__(self, cache: KVCache, make_answer: MakeAnswer, max_batch: int, chunk: int) -> None:
        self.cache, self.make_answer = cache, make_answer
        self.max_batch, self.chunk = max_batch, chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Answer] = []

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return not self.waiting and not self.running

    def next_batch(self) -> Batch:
        """One token of every answer being written, then up to `chunk` tokens of prompts, oldest first."""
        self._admit()
        batch, room = Batch(), self.chunk
        for answer in self.running:
            unread = answer.unread
            assert unread > 0, f"request {answer.request.id}: nothing to read, so no row of the step is its own"
            if unread == 1:
                batch.append(Span(answer, 1))
            elif room > 0:
                batch.append(Span(answer, min(unread, room)))
                room -= min(unread, room)
        return batch

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            taken = len(self.running) + sum(a.request.params.n - 1 for a in self.running if not a.begun)
            if self.running and taken + request.params.n > self.max_batch:
                return
            request.admitted = time.perf_counter()
            cache = self.cache.open(request.prompt, reuse=request.reader is None)
            request.cached_tokens = len(cache)
            self.running.append(self.make_answer(request, 0, cache))
            self.waiting.popleft()

    def due(self, batch: Batch) -> tuple[list[Answer], list[int]]:
        """After the forward pass: the answers that get a token, and for each its row of the N. Prompts fork into n samples here."""
        answers, rows, row = [], [], -1
        for span in batch:
            row += span.count
            is_last = span.is_last
            span.answer.cache.advance(span.tokens)
            if is_last and span.answer.request.reader is None:
                samples = [span.answer, *self._forks(span.answer)]
                answers += samples
                rows += [row] * len(samples)
        return answers, rows

    def _forks(self, answer: Answer) -> list[Answer]:
        request = answer.request
        if request.params.n == 1 or answer.begun:
            return []
        forks = [self.make_answer(request, index, self.cache.fork(answer.cache)) for index in range(1, request.params.n)]
        self.running += forks
        return forks

    def retire(self) -> None:
        """Free what has ended, and mark the requests of which nothing runs any more."""
        ended = [answer for answer in self.running if answer.done]
        if not ended:
            return
        going = [answer for answer in self.running if not answer.done]
        unfinished = {id(answer.request) for answer in going}
        for answer in ended:
            first_text = answer.index == 0 and answer.request.reader is None
            self.cache.close(answer.cache, keep=first_text and answer.request.error is None)
            answer.request.finished = id(answer.request) not in unfinished
        self.running = going
        if self.idle:
            self.cache.check(())

    def fail(self, error: Exception) -> bool:
        """A step broke off: whatever was admitted ends with this error, what waits still waits. False: nothing was admitted."""
        struck = {answer.request for answer in self.running} | {request for request in self.waiting if request.admitted is not None}
        self.waiting = deque(request for request in self.waiting if request not in struck)
        for request in struck:
            if not request.finished:
                request.error, request.finished = error, True
        self.running = []
        self.cache.live.clear()  # half-written, and of nobody now
        return bool(struck)
