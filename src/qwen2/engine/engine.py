"""The engine: requests in, pieces of answers out, one step at a time, on a thread of its own (worker.py).

Whoever asks waits for pieces in the request's outbox; others' requests run beside it in the same steps. Prompts that are only read
(scores, embeddings, logits) are requests like any other, with a reader in place of a sampler.

    request = engine.request(prompt_ids, SamplingParams(temperature=0))
    for _, chunk in engine.run([request]): print(chunk, end="")
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from qwen2.engine.adapters import Adapters
from qwen2.engine.answer import Answer
from qwen2.engine.blocks import BLOCK
from qwen2.engine.constraint import ConstraintError
from qwen2.engine.draft import Draft
from qwen2.engine.grammar import Grammars
from qwen2.engine.kv_cache import KVCache
from qwen2.engine.logprobs import TextLogprobs, not_finite, token_logprobs
from qwen2.engine.memory import cache_blocks, free_memory
from qwen2.engine.request import Chunk, Request, SamplingParams, shown
from qwen2.engine.runner import Runner
from qwen2.engine.sampler import Sampled, make_sampler
from qwen2.engine.scheduler import Batch, Due, Scheduler, due_rows
from qwen2.engine.speculative import MOST, TOGETHER
from qwen2.engine.stops import AnswerText
from qwen2.engine.worker import Worker

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.config import GenerationDefaults
    from qwen2.engine.sampler import Sampler
    from qwen2.model.adapted import ServedAdapter
    from qwen2.weights.model import Model

READ_ONLY = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=1)


class Engine:
    """One model at work. `window` is the most tokens that prompt and answer may have together.

    `cache_bytes` is what the cache may take at most; left out, a window for each of `max_batch` answers where half of what is free
    when the engine is made has room for that, or as many tokens as that has, but one window at least (memory.py). `free_bytes` is
    what is free; left out, what the machine says. It is memory that is taken only as answers grow. When all of it is in use answers
    give way to more important ones and go on later. `keep_bytes` of it may hold ended answers, for prompts that begin like them;
    left out, an eighth of the weights' memory and one window at most. The one that ended last is always kept. `guesses` is how many
    tokens may be guessed and checked at once (speculative.py); 0 is off.
    `draft` is a smaller model of the same tokens that guesses too (draft.py); its cache is part of these bytes.
    """

    def __init__(
        self,
        model: Model,
        window: int,
        max_batch: int = 16,
        chunk: int = 512,
        cache_bits: int = 16,
        cache_bytes: int | None = None,
        keep_bytes: int | None = None,
        guesses: int = MOST,
        draft: Model | None = None,
        free_bytes: int | None = None,
    ) -> None:
        tokenizer = model.tokenizer
        self.tokenizer, self.generation, self.window = tokenizer, model.generation, window
        self.vocab = min(tokenizer.vocab_size, model.config.vocab)  # rows of the output head beyond it are padding, never sampled
        self.eos = frozenset(model.generation.eos) | frozenset(model.config.eos)
        self.hidden_ids = frozenset(tokenizer.control[token] for token in tokenizer.special)
        self.widest = model.config.window
        self.runner, self.adapters = Runner(model.network, cache_bits), Adapters(model.network)
        draft_runner = None if draft is None else self._draft_runner(draft, model, guesses)
        if cache_bytes is None and free_bytes is None:
            free_bytes = free_memory(str(self.runner.device))
        self.cache, self.draft = self._make_caches(draft_runner, max_batch, cache_bytes, keep_bytes, free_bytes)
        self.scheduler = Scheduler(self.cache, max_batch, chunk, guesses if self.runner.native else 0, self.draft)
        self.guessed = self.guessed_right = 0
        self.drafted = self.drafted_right = 0  # those of them that the draft guessed
        self.grammars = Grammars(tokenizer, self.vocab)
        self.ids, self.turns = count(), count()
        self.askers = count(1)  # models besides the first that share these weights (LLM.beside)
        self.horizons: dict[int, int] = {}  # by asker: requests with a smaller id are to end
        self.inbox: deque[Answer] = deque()  # asked for since the last step
        self.told: dict[int, Callable[[], None]] = {}  # whom to notify after this step
        self.lock = threading.RLock()  # held during a step
        self.worker = Worker(self, one_thread=self.runner.native)

    def _draft_runner(self, draft: Model, model: Model, guesses: int) -> Runner:
        """What runs the draft. ValueError where it cannot guess for this model."""
        if not guesses:
            raise ValueError("draft with guesses 0: a draft does nothing but guess; leave one of them out")
        if not self.runner.native or not draft.network.packed:
            raise ValueError("draft: only on a CPU with kernels is a guess checked without changing the text; leave draft out")
        if not draft.tokenizer.same_tokens(model.tokenizer):
            cure = "take a smaller model of the same family, or leave draft out"
            raise ValueError(f"draft {draft.name} has other tokens than {model.name}, so it cannot guess them: {cure}")
        return Runner(draft.network, self.runner.cache_bits)

    def _make_caches(
        self, draft: Runner | None, max_batch: int, cache_bytes: int | None, keep_bytes: int | None, free_bytes: int | None
    ) -> tuple[KVCache, Draft | None]:
        """The blocks, at least so many that one window fits; a draft has one for each at most, and for few answers."""
        own, window = self.runner.memory.block_bytes, -(-self.window // BLOCK)
        block = own if draft is None else own + draft.memory.block_bytes
        limit = cache_blocks(window, max_batch, block, free_bytes) if cache_bytes is None else cache_bytes // block
        if cache_bytes is not None and limit < window:
            tokens, least = limit * BLOCK, window * block
            cure = f"give it {least:,} bytes, or a context of at most {tokens:,} tokens" if tokens else f"give it {least:,} bytes"
            raise ValueError(f"a cache of {cache_bytes:,} bytes holds {tokens:,} tokens, the window is {self.window:,}: {cure}")
        weights = self.runner.network.weight_bytes()
        keep = min(limit, min(weights // 8 // own, window) if keep_bytes is None else keep_bytes // block)
        cache = KVCache(self.runner.memory, limit, keep)
        if draft is None:
            return cache, None
        drafted = KVCache(draft.memory, min(limit, TOGETHER * window), min(keep, TOGETHER * window))
        return cache, Draft(draft, drafted, self.vocab, weights)

    def turn(self) -> bool:
        """A step, on the worker's thread; whether there is more to do. If it breaks off, whoever was admitted fails."""
        with self.lock:
            try:
                self.step()
            except BaseException as error:  # lack of memory, a bug: told where it is waited for, and nobody goes on from half a step
                told = (
                    error if isinstance(error, Exception) else RuntimeError(f"the step was broken off by {type(error).__name__}; ask again")
                )
                for request in self.scheduler.fail(told):
                    self._tell(request)
            idle = self.scheduler.idle
        notified, self.told = self.told, {}
        for notify in notified.values():
            notify()
        return not idle or bool(self.inbox)

    def step(self) -> None:
        """Choose who runs, run them together, give each its token."""
        self._sweep()  # who came, and who was aborted since
        batch = self.scheduler.next_batch()  # sequences, and which tokens of each
        if batch:
            x = self.runner.forward(batch)  # (N, D)
            self._hand_to_readers(batch, x)
            due = self.scheduler.due(batch)  # those whose last token was read
            if due:
                self._commit(due, self.runner.logits(x, *due_rows(due)))  # (R, V)
            self._sweep()  # free what has ended

    def _commit(self, due: Sequence[Due], logits: Tensor) -> None:
        """Append each answer's token, and more where it was guessed right; where logits are not numbers the request fails, it alone."""
        sampled, row = Sampled(logits[:, : self.vocab]), 0
        for answer, _, guess in due:
            try:
                self._write(answer, guess, sampled, logits, row)
            except (FloatingPointError, ConstraintError) as error:
                where = f"request {answer.request.id}, position {len(answer.tokens) - 1}"
                if isinstance(error, FloatingPointError):
                    answer.request.error = FloatingPointError(f"{where}: the model's {error}: {not_finite(self.runner.dtype)}")
                else:
                    answer.request.error = ConstraintError(f"{where}: {error}")
                self._end_samples(answer.request)
            row += 1 + len(guess)

    def _write(self, answer: Answer, guess: Sequence[int], sampled: Sampled, logits: Tensor, row: int) -> None:
        """Tokens from the rows from `row` on, as long as each is what was guessed: the next row has read the guess."""
        asked, right = answer.request.params.logprobs, 0
        for guessed in (*guess, None):
            if answer.done:
                break
            token = sampled.token(row + right, answer.sampler)
            answer.add(token, None if asked is None else token_logprobs(logits[row + right][None], [token], asked, self.vocab)[0])
            if token != guessed:
                break
            answer.cache.advance([token])
            right += 1
        if guess:
            self.guessed, self.guessed_right = self.guessed + len(guess), self.guessed_right + right
            if answer.guesser is not answer.lookup:
                self.drafted, self.drafted_right = self.drafted + len(guess), self.drafted_right + right
            answer.learn_from(len(guess), right)
        self._tell(answer.request)

    def _end_samples(self, request: Request) -> None:
        for sibling in (*self.scheduler.running, *self.scheduler.waiting):
            sibling.done = sibling.done or sibling.request is request
        self._tell(request)

    def _tell(self, request: Request) -> None:
        if request.notify is not None:
            self.told[id(request.notify)] = request.notify

    def _hand_to_readers(self, batch: Batch, x: Tensor) -> None:
        start = 0
        for span in batch:
            answer, reader = span.answer, span.answer.request.reader
            rows = answer.read_rows(span.count)
            if rows and reader is not None:
                answer.handed = len(answer.cache) + rows.stop
                try:
                    reader(self.runner.hidden(x[start + rows.start : start + rows.stop]))
                except ArithmeticError as error:  # raised where the request is waited for
                    answer.request.error, answer.done = error, True
            if answer.request.only_read and span.is_last and not answer.done:
                answer.end_reading()
            start += span.count

    def _voice(self, request: Request, index: int) -> tuple[Sampler, AnswerText]:
        """What chooses a sample's tokens, and what makes text of them."""
        matcher = None if request.form is None else request.form.matcher(request.ends)
        sampler = make_sampler(request.params, request.prompt, self.vocab, self.runner.device, index, matcher)
        return sampler, AnswerText(self.tokenizer, self.hidden_ids, request.params.stop)

    def request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        generation: GenerationDefaults | None = None,
        asker: int = 0,
        adapter: ServedAdapter | None = None,
        eos: frozenset[int] | None = None,
    ) -> Request:
        """Check a prompt and its parameters against the model, compile its constraint; it runs once `run` is iterated.

        `generation`: the defaults of the `asker`, where it is not the model that the engine was made with; `adapter` is one of its own,
        `eos` what ends its texts.
        """
        self.check_ids("prompt", prompt)
        generation = self.generation if generation is None else generation
        context = generation.context if params.context is None else params.context
        room = self.window - len(prompt)
        if context is not None and context < self.window and len(prompt) >= context:
            raise ValueError(f"the prompt has {len(prompt):,} tokens and num_ctx is {context:,}: raise it, or shorten the prompt")
        if room < (0 if params.max_tokens == 0 else 1):
            cure = f"shorten the prompt by at least {-room if params.max_tokens == 0 else 1 - room:,}, an answer needs one token"
            raise ValueError(f"prompt has {len(prompt):,} tokens, the window is {self.window:,}: {cure}{self._wider()}")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            self._check_range(name, ids)
        resolved = params.resolve(generation, room if context is None else min(room, context - len(prompt)))
        ends = frozenset(resolved.stop_token_ids) | (frozenset() if resolved.ignore_eos else self.eos if eos is None else eos)
        form = None if params.constraint is None else self.grammars.compiled(params.constraint)  # on the thread that asks
        only_read = resolved.max_tokens == 0
        request = Request(next(self.ids), list(prompt), resolved, ends, form, only_read=only_read, asker=asker, adapter=adapter)
        if resolved.prompt_logprobs is not None:
            request.reader = request.scored = self.text_logprobs(request.prompt, resolved.prompt_logprobs, adapter=adapter)
        return request

    def text_logprobs(self, tokens: Sequence[int], top: int = 0, first: int = 0, adapter: ServedAdapter | None = None) -> TextLogprobs:
        """A reader that finds the log-probabilities of the tokens that follow row `first` and those behind it."""
        return TextLogprobs(self.runner.network, tokens, self.vocab, top, first, adapter)

    def reading(
        self,
        tokens: Sequence[int],
        reader: Callable[[Tensor], None],
        read_from: int = 0,
        asker: int = 0,
        adapter: ServedAdapter | None = None,
    ) -> Request:
        """A request that only reads: `reader` gets the final hidden states (n, D) from row `read_from` on, chunk by chunk."""
        self.check_ids("prompt", tokens)
        if len(tokens) > self.window:
            cure = f"shorten the text by at least {len(tokens) - self.window:,} or read it in parts"
            raise ValueError(f"prompt has {len(tokens):,} tokens, the window is {self.window:,}: {cure}{self._wider()}")
        params = READ_ONLY.resolve(self.generation, 1)
        own: dict[str, Any] = {"reader": reader, "read_from": read_from, "only_read": True, "asker": asker, "adapter": adapter}
        return Request(next(self.ids), list(tokens), params, **own)

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

    def submit(self, request: Request) -> None:
        """Run a request; what comes of it lies in its outbox, and `request.notify` is called on the engine's thread. From any thread."""
        request.turn = next(self.turns)
        self.inbox.append(Answer(request, 0, self._voice))
        self.worker.wake()

    def run(self, requests: Iterable[Request]) -> Generator[tuple[Request, Chunk], None, None]:
        """The chunks of several requests as they come. Closing the iterator early ends what is left of them.

        No more are taken than keep the batch full, so that requests may be made as they are taken.
        """
        if self.worker.is_current():
            raise RuntimeError("this is the engine's own thread: what it calls may abort requests, not wait for them")
        later, active, news = iter(requests), list[Request](), threading.Event()
        notify = news.set
        try:
            while True:
                for request in islice(later, 2 * self.scheduler.max_batch - len(active)):
                    active.append(request)
                    request.notify = notify
                    self.submit(request)
                if not active:
                    return
                news.wait()
                news.clear()
                over = [request for request in active if request.finished]  # before its outbox is looked at
                for request in active:
                    while request.outbox:
                        yield request, request.outbox.popleft()
                    if request.error is not None:
                        raise request.error
                active = [request for request in active if request not in over]
        finally:
            for request in active:
                if not request.finished:
                    self.abort(request)

    def abort(self, request: Request) -> None:
        """End a request before the next step, wherever it is; its answers so far finish with "abort". From any thread, never waits."""
        request.aborted = True
        self.worker.wake()

    def abort_all(self, asker: int = 0) -> None:
        """End everything that it asked for before this call, begun or not. Never waits: a step in progress is finished first."""
        self.horizons[asker] = next(self.ids)
        self.worker.wake()

    def settle(self) -> None:
        """Wait until nothing is left to do."""
        while not (self.scheduler.idle and not self.inbox):
            with self.lock:  # a step is over when it can be had
                pass
            time.sleep(0.0005)

    def clear_cache(self) -> None:
        """Forget all texts that nobody is reading."""
        self.settle()
        with self.lock:
            self.cache.clear()
            if self.draft is not None:
                self.draft.cache.clear()

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values that are held or can be found, the draft's too."""
        return self.cache.nbytes + (0 if self.draft is None else self.draft.cache.nbytes)

    @property
    def cache_limit_bytes(self) -> int:
        """What that may become."""
        return self.cache.limit_bytes + (0 if self.draft is None else self.draft.cache.limit_bytes)

    @property
    def cache_limit_tokens(self) -> int:
        """The same in tokens of all texts together, the draft's not counted."""
        return self.cache.pool.limit * BLOCK

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights, the draft's and the adapters' too."""
        drafts = 0 if self.draft is None else self.draft.runner.network.weight_bytes()
        return self.runner.network.weight_bytes() + self.adapters.nbytes + drafts

    def _sweep(self) -> None:
        """Take in who came; free what has ended or was aborted. Each of a request's n samples ends with an output, begun or not."""
        scheduler = self.scheduler
        while self.inbox:
            scheduler.add(self.inbox.popleft())
        for answer in (*scheduler.running, *scheduler.waiting):
            if not answer.done and self._unwanted(answer.request):
                answer.abort()
                if answer.width > 1:  # its prompt was still to be read for all samples
                    for sibling in answer.siblings():
                        sibling.abort()
        for request in scheduler.retire():
            self._tell(request)

    def _unwanted(self, request: Request) -> bool:
        return request.aborted or request.id < self.horizons.get(request.asker, 0)

    def check(self) -> None:
        """Every block is accounted for; RuntimeError names what is not."""
        with self.lock:
            self.cache.check(answer.cache for answer in self.scheduler.running)
            if self.draft is not None:
                self.draft.check()
