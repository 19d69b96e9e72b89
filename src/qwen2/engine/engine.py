"""The engine: requests in, pieces of answers out, one step at a time.

Whoever waits for a piece turns the crank: streams that are read alternately, or from several threads, advance together.
Prompts that are only read (scores, embeddings, logits) are requests like any other, with a reader in place of a sampler.

    request = engine.request(prompt_ids, SamplingParams(temperature=0))
    for _, chunk in engine.run([request]): print(chunk, end="")
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

import torch

from qwen2.engine.answer import Answer
from qwen2.engine.kv_cache import AnySequence, KVCache
from qwen2.engine.request import Chunk, Request, SamplingParams, shown
from qwen2.engine.runner import Runner, not_finite
from qwen2.engine.sampler import make_sampler, sample, token_logprob
from qwen2.engine.scheduler import Batch, Scheduler
from qwen2.engine.stops import AnswerText

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.weights.model import Model

READ_ONLY = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=1)


class Engine:
    """One model at work. `window` is the most tokens that prompt and answer may have together.

    Between requests the cache of the one served last is kept, a window at most and its room to grow; older ones only while all
    that are kept take no more than an eighth of the weights' memory together, nor than one full window.
    """

    def __init__(self, model: Model, window: int, max_batch: int = 16, chunk: int = 512, cache_bits: int = 16) -> None:
        tokenizer = model.tokenizer
        self.tokenizer, self.generation, self.window = tokenizer, model.generation, window
        self.vocab = min(tokenizer.vocab_size, model.config.vocab)  # rows of the output head beyond it are padding, never sampled
        self.eos = frozenset(model.generation.eos) | frozenset(model.config.eos)
        self.hidden_ids = frozenset(tokenizer.control[token] for token in tokenizer.special)
        self.widest = model.config.window
        self.runner = Runner(model.network, cache_bits)
        self.cache = KVCache(self.runner.new_sequence, keep_bytes=self._spare_bytes(model))
        self.scheduler = Scheduler(self.cache, self._answer, max_batch, chunk)
        self.ids = count()
        self.horizon = 0  # requests with a smaller id are to end
        self.lock = threading.RLock()  # held by whoever changes the scheduler
        self.busy = False  # whether the thread that holds it is in the middle of a change

    def _spare_bytes(self, model: Model) -> int:
        """What kept caches may take together: an eighth of the weights' memory, and no more than one full window."""
        return min(model.network.weight_bytes() // 8, self.window * self.runner.token_bytes)

    def step(self) -> None:
        """One turn, under the lock; beside the kernels' threads torch has one, so that its own do not spin against them."""
        threads = torch.get_num_threads()
        if self.runner.layout is not None:
            torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                self._step()
        finally:
            torch.set_num_threads(threads)

    def _step(self) -> None:
        """Choose who runs, run them together, give each its token."""
        self._sweep()  # who was aborted since
        batch = self.scheduler.next_batch()  # sequences, and which tokens of each
        if not batch:
            return
        x = self.runner.forward(batch)  # (N, D)
        self._hand_to_readers(batch, x)
        answers, rows = self.scheduler.due(batch)  # those whose last token was read
        if answers:
            logits = self.runner.logits(x, rows)  # (R, V)
            self._commit(answers, logits, sample(logits[:, : self.vocab], [answer.sampler for answer in answers]))
        self._sweep()  # free what has ended

    def _commit(self, answers: Sequence[Answer], logits: Tensor, tokens: Sequence[int | ArithmeticError]) -> None:
        """Append each answer's token; where the logits are not numbers the request fails, and it alone."""
        for answer, row, token in zip(answers, logits, tokens, strict=True):
            request = answer.request
            if isinstance(token, ArithmeticError):
                where = f"request {request.id}, position {len(answer.tokens) - 1}"
                request.error = FloatingPointError(f"{where}: the model's {token}: {not_finite(self.runner.dtype)}")
                for sibling in self.scheduler.running:
                    sibling.done = sibling.done or sibling.request is request
            elif not answer.done:
                asked = request.params.logprobs
                answer.add(token, None if asked is None else token_logprob(row, token, asked, self.vocab))

    def _hand_to_readers(self, batch: Batch, x: Tensor) -> None:
        start = 0
        for span in batch:
            reader = span.answer.request.reader
            if reader is not None:
                span.answer.done = span.is_last
                try:
                    reader(self.runner.hidden(x[start : start + span.count]))
                except ArithmeticError as error:  # raised where the request is waited for
                    span.answer.request.error, span.answer.done = error, True
            start += span.count

    def _answer(self, request: Request, index: int, cache: AnySequence) -> Answer:
        sampler = make_sampler(request.params, request.prompt, self.vocab, self.runner.device, index)
        return Answer(request, index, cache, sampler, AnswerText(self.tokenizer, self.hidden_ids, request.params.stop))

    def request(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Check a prompt and its parameters against the model; it runs once `run` is iterated."""
        self.check_ids("prompt", prompt)
        room = self.window - len(prompt)
        if room < 1:
            cure = f"shorten the prompt by at least {1 - room:,}, an answer needs one token"
            raise ValueError(f"prompt has {len(prompt):,} tokens, the window is {self.window:,}: {cure}{self._wider()}")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            self._check_range(name, ids)
        resolved = params.resolve(self.generation, room)
        ends = frozenset(resolved.stop_token_ids) | (frozenset() if resolved.ignore_eos else self.eos)
        return Request(next(self.ids), list(prompt), resolved, ends)

    def reading(self, tokens: Sequence[int], reader: Callable[[Tensor], None]) -> Request:
        """A request that only reads: `reader` gets the final hidden states (n, D), chunk by chunk."""
        self.check_ids("prompt", tokens)
        if len(tokens) > self.window:
            cure = f"shorten the text by at least {len(tokens) - self.window:,} or read it in parts"
            raise ValueError(f"prompt has {len(tokens):,} tokens, the window is {self.window:,}: {cure}{self._wider()}")
        return Request(next(self.ids), list(tokens), READ_ONLY.resolve(self.generation, 1), reader=reader)

    def _wider(self) -> str:
        return f"; or raise context, this model allows {self.widest:,}" if self.window < self.widest else ""

    def check_ids(self, name: str, ids: Sequence[int]) -> None:
        """ValueError unless there is at least one id and every one is a token of the vocabulary."""
        if len(ids) == 0:
            raise ValueError(f"{name} is empty: a model needs at least one token to go on from")
        self._check_range(name, ids)

    def _check_range(self, name: str, ids: Iterable[int]) -> None:
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool):
                raise ValueError(f"{name}: token ids are whole numbers, got {shown(token)}")
            if not 0 <= token < self.vocab:
                raise ValueError(f"{name}: token id {shown(token)} is not in the vocabulary, whose ids go from 0 to {self.vocab - 1}")

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Chunk]]:
        """The chunks of several requests as they come. Closing the iterator early frees their sequences."""
        later, active = deque(requests), list[Request]()
        try:
            while later or active:
                while later and len(active) < 2 * self.scheduler.max_batch:
                    active.append(later.popleft())
                    self._submit(active[-1])
                self._turn(active)
                for request in active:
                    while request.outbox:
                        yield request, request.outbox.popleft()
                    if request.error is not None:
                        raise request.error
                active = [request for request in active if request.outbox or not request.finished]
        finally:
            for request in active:
                if not request.finished:
                    self.abort(request)

    def _submit(self, request: Request) -> None:
        with self.lock:
            self._refuse_inside()
            self.scheduler.waiting.append(request)

    def _turn(self, active: Sequence[Request]) -> None:
        """A step, unless another thread's brought something meanwhile."""
        with self.lock:
            self._refuse_inside()
            if not any(request.outbox or request.finished for request in active):
                self._change(self.step)

    def _refuse_inside(self) -> None:
        if self.busy:
            raise RuntimeError("this thread is in the middle of a step: a signal's handler may abort requests, not run them")

    def _change(self, work: Callable[[], None]) -> None:
        """A step or a sweep, under the lock. If it breaks off, whoever was admitted fails: nobody goes on from half a step.

        In the middle of another change nothing is done: the collector may close a forgotten stream there, a signal's handler may
        abort, and what they marked is swept when the step ends.
        """
        if self.busy:
            return
        self.busy = True
        try:
            work()
        except BaseException as error:  # lack of memory, Ctrl-C: each request hears of it where it is waited for
            told = error if isinstance(error, Exception) else RuntimeError(f"the step was broken off by {type(error).__name__}; ask again")
            if not self.scheduler.fail(told) or told is not error:
                raise
        finally:
            self.busy = False

    def abort(self, request: Request) -> None:
        """End a request now, wherever it is; its answers so far finish with "abort". Nothing happens to one that has ended."""
        request.aborted = True
        swept = False
        while not swept and not request.finished:  # another thread's step may end it before the lock is ours
            swept = self._swept(timeout=0.01)

    def abort_all(self) -> None:
        """End everything that was asked for before this call, begun or not. Never waits: a step in progress is finished first."""
        self.horizon = next(self.ids)
        self._swept(timeout=0)

    def _swept(self, timeout: float) -> bool:
        """Sweep, unless the lock cannot be had in so many seconds."""
        got = self.lock.acquire(timeout=timeout)
        if got:
            try:
                self._change(self._sweep)
            finally:
                self.lock.release()
        return got

    def _sweep(self) -> None:
        """Free what has ended or was aborted; each of a request's n samples ends with an output, whether it had begun or not."""
        scheduler = self.scheduler
        for request in [request for request in scheduler.waiting if self._unwanted(request)]:
            self._abort_unbegun(request, range(request.params.n))
            request.finished = True
            scheduler.waiting.remove(request)
        for answer in scheduler.running:
            if not answer.done and self._unwanted(answer.request):
                answer.abort()
                if not answer.begun:  # its prompt was still being read for all samples
                    self._abort_unbegun(answer.request, range(1, answer.request.params.n))
        scheduler.retire()

    def _unwanted(self, request: Request) -> bool:
        return request.aborted or request.id < self.horizon

    def _abort_unbegun(self, request: Request, indices: Iterable[int]) -> None:
        for index in indices:
            self._answer(request, index, self.cache.new()).abort()

    def check(self) -> None:
        """Every sequence is accounted for; RuntimeError names what is not."""
        with self.lock:
            self.cache.check(answer.cache for answer in self.scheduler.running)
