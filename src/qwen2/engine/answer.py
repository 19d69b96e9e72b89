"""One answer in the making: its tokens, cache, sampler and text, and the reasons for which it ends.

A request for n samples has n of these; they share the prompt's forward pass. Finish reasons come from here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qwen2.engine.request import Chunk, FinishReason, Output, Request, Timings, TokenLogprob, Usage
from qwen2.engine.speculative import Lookup

if TYPE_CHECKING:
    from qwen2.engine.draft import Follower
    from qwen2.engine.kv_cache import BlockSequence
    from qwen2.engine.sampler import Sampler
    from qwen2.engine.stops import AnswerText


class Answer:
    """Sample `index` of a request, from admission to its end."""

    cache: BlockSequence  # None while it waits

    def __init__(self, request: Request, index: int, make: Callable[[Request, int], tuple[Sampler, AnswerText]]) -> None:
        self.request, self.index, self._make = request, index, make
        self.sampler, self.text = make(request, index)
        self.cache = None  # type: ignore[assignment]
        self.tokens = list(request.prompt)  # prompt and answer
        self.handed = 0  # rows that the reader has had, if there is one
        self.logprobs: list[TokenLogprob] = []
        self.done = False
        self.lookup: Lookup | None = None
        self.guesser: Lookup | Follower | None = None  # who guessed last

    @property
    def unread(self) -> int:
        """Tokens that the model has not seen yet: the rest of the prompt, or the one sampled last."""
        return len(self.tokens) - len(self.cache)

    @property
    def width(self) -> int:
        """Samples that this stands for: all of a request until the first token, then one."""
        return 1 if self.begun or self.index else self.request.params.n

    def read_rows(self, count: int) -> range:
        """Of the next `count` tokens those whose hidden states the request's reader still waits for, counted from the next."""
        request = self.request
        if request.reader is None or self.index:
            return range(0)
        start = len(self.cache)
        first, end = max(self.handed, request.read_from, start), min(start + count, len(request.prompt))
        return range(first - start, end - start) if first < end else range(0)

    @property
    def reusable(self) -> Sequence[int]:
        """Tokens of which all but the last may be found in the cache: not those whose hidden states are still waited for."""
        request = self.request
        if request.reader is None or self.index or self.handed >= len(request.prompt):
            return self.tokens
        return self.tokens[: max(self.handed, request.read_from) + 1]

    def guess(self, most: int) -> tuple[int, ...]:
        """Tokens that may follow, no more than may still be written."""
        if not self.begun:
            return ()
        if self.lookup is None:
            self.lookup = Lookup()
        self.guesser = self.lookup
        return self.lookup.guess(self.tokens, min(most, self.room))

    @property
    def room(self) -> int:
        """How many tokens may be guessed: one less than may still be written, since one follows them."""
        assert self.request.params.max_tokens is not None, "the window bounds every answer"
        return self.request.params.max_tokens - self.written - 1

    def learn_from(self, offered: int, right: int) -> None:
        """So many of the guesses were right."""
        assert self.guesser is not None, "who was checked has guessed"
        self.guesser.learn_from(offered, right)

    def siblings(self) -> list[Answer]:
        """The other samples of the request."""
        return [Answer(self.request, index, self._make) for index in range(1, self.request.params.n)]

    @property
    def begun(self) -> bool:
        """Whether a token was sampled, so that all n samples exist."""
        return self.written > 0

    @property
    def written(self) -> int:
        """How many tokens the answer has."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def generated(self) -> Sequence[int]:
        """The answer's tokens."""
        return self.tokens[len(self.request.prompt) :]

    def add(self, token: int, logprob: TokenLogprob | None) -> None:
        """Append a sampled token and put what may be shown into the request's outbox."""
        request = self.request
        if request.first_token is None:
            request.first_token = time.perf_counter()
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        piece = "" if token in request.ends else self.text.push(token)
        reason = self._reason(token)
        chunk = Chunk(piece, (token,), () if logprob is None else (logprob,), self.index)
        if reason is not None:
            chunk = self._last(chunk, reason, self.text.stopped or (token if token in request.ends else None))
        if chunk.text or chunk.finish_reason or chunk.token_ids:
            request.outbox.append(chunk)

    def _reason(self, token: int) -> FinishReason | None:
        if token in self.request.ends or self.text.stopped is not None or self.sampler.complete:
            return "stop"
        assert self.request.params.max_tokens is not None, "the window bounds every answer"
        return "length" if self.written >= self.request.params.max_tokens else None

    def end_reading(self) -> None:
        """All was read, and nothing is to be written."""
        if self.request.scored is None:
            self.done = True
        else:
            self.request.outbox.append(self._last(Chunk("", index=self.index), "length", None))

    def abort(self) -> None:
        """End here, with what there is."""
        self.request.outbox.append(self._last(Chunk("", index=self.index), "abort", None))

    def _last(self, chunk: Chunk, reason: FinishReason, stopped_by: str | int | None) -> Chunk:
        """The closing chunk: what was held back, and the whole output."""
        self.done = True
        rest = self.text.flush()
        if self.text.stopped is not None:  # a stop string can be complete only now, with an unfinished character
            reason, stopped_by = "stop", self.text.stopped
        return Chunk(chunk.text + rest, chunk.token_ids, chunk.logprobs, self.index, reason, self._output(reason, stopped_by))

    def _output(self, reason: FinishReason, stopped_by: str | int | None) -> Output:
        request, now = self.request, time.perf_counter()
        first = now if request.first_token is None else request.first_token
        generated = tuple(self.generated)
        admitted = now if request.admitted is None else request.admitted
        return Output(
            text=self.text.whole(),
            token_ids=generated,
            finish_reason=reason,
            usage=Usage(len(request.prompt), len(generated), request.cached_tokens),
            params=request.params,
            timings=Timings(first - admitted, now - first),
            logprobs=None if request.params.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=request.prompt_logprobs(),
            stopped_by=stopped_by,
        )
