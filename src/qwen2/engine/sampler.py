"""From a row of logits to a token: the chain of transforms is built once per sample, each step only applies what was asked.

Order: repetition, presence and frequency penalty, logit bias, constraint, temperature, top-k, top-p, min-p, draw. Every sample draws
from a generator of its own, one number a token, so that a seed gives the same text whatever else runs in the batch. Left out:
log-probabilities, which are those of the model itself, before any of these (logprobs.py).

    sampler = make_sampler(params, prompt, vocab=151646, device=torch.device("cpu"))
    token = sampler(row)                                                        # row (V,) float32
"""

# R rows, V vocabulary without padding rows, C candidates that are still in the draw

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import torch

from qwen2 import kernels
from qwen2.kernels.calls import argmax_rows

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.engine.grammar import Matcher
    from qwen2.engine.request import ResolvedParams

Candidates = tuple["Tensor", "Tensor | None"]  # logits (C,) and their token ids (C,); None: all of the vocabulary, in order
Cut = Callable[["Tensor", "Tensor | None"], Candidates]
FIRST_SORTED = 1024  # top-p sorts this many candidates first and all of them only when their mass does not suffice
COLDEST = 1e-20  # below it a temperature is greedy in float32 anyway, and 0/0 must not happen


class Sampler:
    """Chooses one sample's tokens and remembers what the penalties and the constraint need: every token it gives is written."""

    def __init__(
        self,
        params: ResolvedParams,
        history: History | None,
        bias: tuple[Tensor, Tensor] | None,
        cuts: list[Cut],
        matcher: Matcher | None = None,
    ) -> None:
        self.temperature = params.temperature
        self.greedy = params.temperature == 0
        self.takes_best = self.greedy and history is None and bias is None  # the row's largest logit, if it is allowed
        self.plain = self.takes_best and matcher is None  # the step's common argmax will do
        self.history = history
        self.matcher = matcher
        self.bias = bias
        self.cuts = cuts
        self.random: Random | None = None

    def __call__(self, row: Tensor, best: int | None = None) -> int:
        """row (V,) float32, left as it is -> a token id, which is remembered. `best`: where its largest logit is, if that is known."""
        matcher = self.matcher
        if matcher is not None and self.takes_best and best is not None and matcher.take(best):
            return best
        if self.history is None:
            token = self.choose(self.biased(row))
        else:
            with self.history.penalised(row):
                token = self.choose(self.biased(row))
            self.history.add(token)
        if matcher is not None:
            matcher.accept(token)
        return token

    @property
    def complete(self) -> bool:
        """Whether the constraint lets nothing follow."""
        return self.matcher is not None and self.matcher.complete

    def biased(self, row: Tensor) -> Tensor:
        """The logit bias added."""
        return row if self.bias is None else row.index_add(0, *self.bias)

    def choose(self, row: Tensor) -> int:
        """Greedy, or a draw from what the constraint and the cuts leave."""
        matcher = self.matcher
        if matcher is None:
            return self._choose(row, None)
        if matcher.free or self.greedy:  # one token is looked at before all of them are: the likeliest is the choice if it is allowed
            token = self._choose(row, None)
            if matcher.allows(token) if matcher.free else matcher.surely_allows(token):
                return token
        return self._choose(*matcher.narrow(row))

    def _choose(self, logits: Tensor, ids: Tensor | None) -> int:
        """logits (C,) of tokens with these ids, None for all of the vocabulary -> one of them."""
        if self.greedy:
            place = largest(logits[None])[0][0]
        else:
            logits, ids = candidates((logits - logits.amax()) / max(self.temperature, COLDEST), self.cuts, ids)
            assert self.random is not None, "make_sampler gives one to whoever draws"
            place = draw(logits, self.random)
        return place if ids is None else int(ids[place])


class History:
    """Which tokens have been seen, and how often in the answer; a step costs as much as there are, not the vocabulary.

    Of a window: among its last tokens. What has left it keeps its place and is not penalised.
    """

    def __init__(self, params: ResolvedParams, prompt: Sequence[int], vocab: int, device: torch.device) -> None:
        self.repetition, self.presence, self.frequency = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self.places = {token: place for place, token in enumerate(dict.fromkeys(t for t in prompt if t < vocab))}
        self.seen = torch.tensor(list(self.places), dtype=torch.long, device=device)  # (S,), prompt and answer
        self.counts = torch.zeros(len(self.places), device=device)  # (S,), answer only
        self.window = params.penalty_window
        self.recent: deque[tuple[int, bool]] = deque()  # (place, whether of the answer), of a window only
        self.uses = torch.zeros_like(self.counts)  # (S,), how often each is among them
        for token in prompt[max(0, len(prompt) - self.window) :] if self.window > 0 else ():
            if token < vocab:
                self.recent.append((self.places[token], False))
                self.uses[self.places[token]] += 1

    def add(self, token: int) -> None:
        """A token of the answer."""
        place = self.places.setdefault(token, len(self.places))
        if place == len(self.seen):
            self.seen = torch.cat([self.seen, self.seen.new_tensor([token])])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(1)])
            self.uses = torch.cat([self.uses, self.uses.new_zeros(1)])
        self.counts[place] += 1
        if self.window < 0:
            return
        self.recent.append((place, True))
        self.uses[place] += 1
        while len(self.recent) > self.window:
            left, answered = self.recent.popleft()
            self.uses[left] -= 1
            self.counts[left] -= int(answered)

    @contextmanager
    def penalised(self, row: Tensor) -> Iterator[None]:
        """Repetition divides positive and multiplies negative logits of row (V,), the other two subtract; afterwards it is as before."""
        logits = before = row[self.seen]
        if self.repetition != 1:
            logits = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
            if self.window >= 0:
                logits = torch.where(self.uses > 0, logits, before)
        if self.presence != 0 or self.frequency != 0:
            logits = logits - self.presence * (self.counts > 0) - self.frequency * self.counts
        row.index_copy_(0, self.seen, logits)
        yield
        row.index_copy_(0, self.seen, before)


def make_sampler(
    params: ResolvedParams, prompt: Sequence[int], vocab: int, device: torch.device, index: int = 0, matcher: Matcher | None = None
) -> Sampler:
    """Build the chain for sample `index` of a request; `vocab` is the tokenizer's size, the rows beyond it are padding."""
    penalties = params.penalty_window != 0 and (
        params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    )
    history = History(params, prompt, vocab, device) if penalties else None
    bias = None
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), dtype=torch.long, device=device)
        bias = ids, torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
    cuts: list[Cut] = []
    if params.top_k > 0:
        cuts.append(partial(keep_top_k, k=params.top_k))
    if params.top_p < 1:
        cuts.append(partial(keep_top_p, p=params.top_p))
    if params.min_p > 0:
        cuts.append(partial(keep_min_p, p=params.min_p))
    sampler = Sampler(params, history, bias, cuts, matcher)
    if not sampler.greedy:
        assert params.seed is not None, "resolve() draws a seed"
        sampler.random = Random((params.seed + index) % 2**64)  # the same numbers on every system, and no torch operation a token
    return sampler


def candidates(logits: Tensor, cuts: Sequence[Cut], ids: Tensor | None = None) -> Candidates:
    """logits (C,) and their ids, None for all of the vocabulary -> what every cut leaves of them."""
    for cut in cuts:
        logits, ids = cut(logits, ids)
    return logits, ids


def keep_top_k(logits: Tensor, ids: Tensor | None, k: int) -> Candidates:
    """The k likeliest."""
    if k >= len(logits):
        return logits, ids
    values, places = logits.topk(k)
    return values, _pick(ids, places)


def keep_top_p(logits: Tensor, ids: Tensor | None, p: float) -> Candidates:
    """The fewest likeliest whose probabilities reach p together; always at least one."""
    total = logits.logsumexp(-1)
    for size in (min(FIRST_SORTED, len(logits)), len(logits)):
        values, places = logits.topk(size)  # sorted, likeliest first
        probabilities = (values - total).exp()
        before = probabilities.cumsum(-1) - probabilities  # (C,) mass of the likelier ones
        kept = max(1, int((before < p).sum()))
        if kept < size:
            break
    return values[:kept], _pick(ids, places[:kept])


def keep_min_p(logits: Tensor, ids: Tensor | None, p: float) -> Candidates:
    """Those at least p times as likely as the likeliest."""
    places = (logits >= logits.amax() + math.log(p)).nonzero().squeeze(-1)
    return logits[places], _pick(ids, places)


def _pick(ids: Tensor | None, places: Tensor) -> Tensor:
    return places if ids is None else ids[places]


def draw(logits: Tensor, random: Random) -> int:
    """A place (0 .. C-1) with softmax probability, by one uniform number; in float64, so the tail is exact."""
    bounds = logits.double().softmax(-1).cumsum(-1)  # (C,)
    place = torch.searchsorted(bounds, bounds[-1:] * random.random(), right=True)  # the first bound above it: never an empty interval
    return min(int(place), len(logits) - 1)


def largest(logits: Tensor) -> tuple[list[int], list[float]]:
    """Place and value of the largest logit of each row of (R, V); a NaN counts as the largest."""
    if logits.is_cpu and logits.dtype == torch.float32 and logits.stride(-1) == 1 and kernels.isa() is not None:
        return argmax_rows(logits.data_ptr(), len(logits), logits.shape[1], logits.stride(0))  # torch takes ten times as long
    best = logits.argmax(-1)
    return best.tolist(), logits.gather(-1, best[:, None]).squeeze(-1).tolist()


class Sampled:
    """A step's logits (R, V) float32 without padding rows; a row's token is chosen when it is asked for."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.best, self.peaks = largest(logits)

    def token(self, row: int, sampler: Sampler) -> int:
        """The row's token. FloatingPointError where the row is not finite."""
        peak = self.peaks[row]
        if not math.isfinite(peak):
            raise FloatingPointError(f"logits are {peak}")
        return self.best[row] if sampler.plain else sampler(self.logits[row], self.best[row])
