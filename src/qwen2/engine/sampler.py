"""From a row of logits to a token: the chain of transforms is built once per sample, each step only applies what was asked.

Order: repetition, presence and frequency penalty, logit bias, temperature, top-k, top-p, min-p, draw. Every sample draws from a
generator of its own, one number a token, so that a seed gives the same text whatever else runs in the batch. Log-probabilities
are those of the model itself, before any of these.

Left out: constraints on the answer's form; they join the chain as one more transform.

    sampler = make_sampler(params, prompt, vocab=151646, device=torch.device("cpu"))
    token = sampler(row)                                                        # row (V,) float32
"""

# R rows, V vocabulary without padding rows, C candidates that are still in the draw

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from qwen2.engine.request import TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.engine.request import ResolvedParams

Candidates = tuple["Tensor", "Tensor | None"]  # logits (C,) and their token ids (C,); None: all of the vocabulary, in order
Cut = Callable[["Tensor", "Tensor | None"], Candidates]
FIRST_SORTED = 1024  # top-p sorts this many candidates first and all of them only when their mass does not suffice
COLDEST = 1e-20  # below it a temperature is greedy in float32 anyway, and 0/0 must not happen


class Sampler:
    """Chooses one sample's tokens and remembers what the penalties need."""

    def __init__(self, params: ResolvedParams, history: History | None, bias: tuple[Tensor, Tensor] | None, cuts: list[Cut]) -> None:
        self.temperature = params.temperature
        self.greedy = params.temperature == 0
        self.plain = self.greedy and history is None and bias is None  # the step's common argmax will do
        self.history = history
        self.bias = bias
        self.cuts = cuts
        self.generator: torch.Generator | None = None

    def __call__(self, row: Tensor) -> int:
        """row (V,) float32, left as it is -> a token id, which is remembered."""
        token = self.choose(self.adjusted(row))
        if self.history is not None:
            self.history.add(token)
        return token

    def adjusted(self, row: Tensor) -> Tensor:
        """Penalties and bias applied."""
        if self.history is not None:
            row = self.history.penalise(row)
        if self.bias is not None:
            row = row.index_add(0, *self.bias)
        return row

    def choose(self, row: Tensor) -> int:
        """Greedy, or a draw from what the cuts leave."""
        if self.greedy:
            return int(row.argmax())
        logits, ids = candidates((row - row.amax()) / max(self.temperature, COLDEST), self.cuts)
        place = draw(logits, self.generator)
        return place if ids is None else int(ids[place])


class History:
    """Which tokens have been seen, kept on the device; a step costs one pass over the vocabulary."""

    def __init__(self, params: ResolvedParams, prompt: Sequence[int], vocab: int, device: torch.device) -> None:
        self.repetition, self.presence, self.frequency = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)  # prompt and answer
        self.seen[torch.tensor([t for t in prompt if t < vocab], dtype=torch.long, device=device)] = True
        self.counts = torch.zeros(vocab, device=device)  # answer only

    def add(self, token: int) -> None:
        """A token of the answer."""
        self.seen[token] = True
        self.counts[token] += 1

    def penalise(self, row: Tensor) -> Tensor:
        """(V,) -> (V,): repetition divides positive and multiplies negative logits; the other two subtract."""
        if self.repetition != 1:
            row = torch.where(self.seen, torch.where(row > 0, row / self.repetition, row * self.repetition), row)
        if self.presence != 0 or self.frequency != 0:
            row = row - self.presence * (self.counts > 0) - self.frequency * self.counts
        return row


def make_sampler(params: ResolvedParams, prompt: Sequence[int], vocab: int, device: torch.device, index: int = 0) -> Sampler:
    """Build the chain for sample `index` of a request; `vocab` is the tokenizer's size, the rows beyond it are padding."""
    penalties = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
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
    sampler = Sampler(params, history, bias, cuts)
    if not sampler.greedy:
        assert params.seed is not None, "resolve() draws a seed"
        sampler.generator = torch.Generator().manual_seed((params.seed + index) % 2**64)
    return sampler


def candidates(logits: Tensor, cuts: Sequence[Cut]) -> Candidates:
    """logits (V,) -> what every cut leaves of them."""
    ids: Tensor | None = None
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


def draw(logits: Tensor, generator: torch.Generator | None) -> int:
    """A place (0 .. C-1) with softmax probability, by one uniform number from the generator; in float64, so the tail is exact."""
    bounds = logits.double().softmax(-1).cumsum(-1)  # (C,)
    number = float(torch.rand((), dtype=torch.float64, generator=generator))  # [0, 1)
    place = torch.searchsorted(bounds, bounds[-1:] * number, right=True)  # the first bound above it: never an empty interval
    return min(int(place), len(logits) - 1)


def token_logprob(row: Tensor, token: int, top: int, vocab: int) -> TokenLogprob:
    """A row of logits as the model gave it, padding included -> the chosen token's log-probability and the `top` likeliest of `vocab`."""
    logprobs = row.float().log_softmax(-1)
    best = logprobs[:vocab].topk(min(top, vocab))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs[token]), tuple(pairs))


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | ArithmeticError]:
    """logits (R, V) float32 without padding rows -> a token id a row, or the error where a row is not finite."""
    best = logits.argmax(-1)  # (R,); a NaN counts as the largest
    peaks = logits.gather(-1, best[:, None]).squeeze(-1).tolist()
    tokens: list[int | ArithmeticError] = list(best.tolist())
    for row, (sampler, peak) in enumerate(zip(samplers, peaks, strict=True)):
        if not math.isfinite(peak):
            tokens[row] = FloatingPointError(f"logits are {peak}")
        elif not sampler.plain:
            tokens[row] = sampler(logits[row])
    return tokens
