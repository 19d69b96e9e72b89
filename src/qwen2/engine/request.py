"""What is asked of the engine and what comes back: sampling parameters, requests, pieces of an answer, whole answers.

Every front end (Python, command line, servers) translates into these; none of them holds model logic.

    python -c "from qwen2 import SamplingParams; print(SamplingParams(temperature=0.7, stop='END', max_tokens=64))"
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from qwen2.engine.constraint import Constraint

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.config.generation import GenerationDefaults
    from qwen2.engine.grammar import Compiled
    from qwen2.engine.logprobs import TextLogprobs
    from qwen2.model.adapted import ServedAdapter
    from qwen2.tokenizer import Delta, ToolCall

FinishReason = Literal["stop", "length", "abort", "tool_calls"]
DEFAULTED = (  # what the model has a default for
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("penalty_window", "seed", "stop", "max_tokens", "context"),
)
SHOWN_BITS = 200  # of a number in a message; longer ones are given by their size
SHOWN_CHARACTERS = 80
SEED_BITS = 31  # short enough to be typed again
MOST_SAMPLES = 128  # each has a cache of its own


def _number(name: str, value: object, rule: str, low: float, high: float, open_low: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        raise ValueError(f"{name} {shown(value)}: must be {rule}")


def _whole(name: str, value: object, rule: str, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} {shown(value)}: must be {rule}")


def _listed(name: str, value: object, rule: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, Set)):
        raise ValueError(f"{name} {shown(value)}: must be {rule}")
    return tuple(value)


def shown(value: object) -> str:
    """A value for a message of one line."""
    if isinstance(value, int) and value.bit_length() > SHOWN_BITS:  # Python refuses to write the largest
        return f"{'-' if value < 0 else ''}2**{value.bit_length() - 1}..."
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. None takes the model's own generation default; `Output.params` says what was used.

    The transforms apply in this order: penalties, logit bias, constraint, temperature, top-k, top-p, min-p.
    """

    temperature: float | None = field(default=None, metadata={"help": "0 takes the likeliest token."})
    top_k: int | None = field(default=None, metadata={"help": "0 is off."})
    top_p: float | None = field(default=None, metadata={"help": "1 is off."})
    min_p: float | None = field(
        default=None, metadata={"help": "0 is off; otherwise the least share of the likeliest token's probability."}
    )
    repetition_penalty: float | None = field(default=None, metadata={"help": "1 is off; over prompt and answer, as transformers does."})
    presence_penalty: float | None = field(default=None, metadata={"help": "0 is off; over the answer only, as OpenAI's."})
    frequency_penalty: float | None = field(default=None, metadata={"help": "0 is off; over the answer only, times the count."})
    penalty_window: int | None = field(
        default=None, metadata={"help": "How many of the last tokens the penalties look at, 0 is none of them; -1 is all."}
    )
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False, metadata={"help": "By token id, what is added to its logit."})
    seed: int | None = field(
        default=None, metadata={"help": "Left out, one is drawn, and the answer's params report it; sample i of n uses seed + i."}
    )
    stop: str | Sequence[str] | None = field(
        default=None, metadata={"help": "The answer ends before the first of these; not part of the text."}
    )
    stop_token_ids: Sequence[int] = field(default=(), metadata={"help": "Tokens that end the answer, besides the model's own."})
    ignore_eos: bool = field(default=False, metadata={"help": "Go on where the model would end."})
    max_tokens: int | None = field(default=None, metadata={"help": "Left out, the model's default, or to the end of the window."})
    logprobs: int | None = field(
        default=None, metadata={"help": "None: none; k: of the chosen token and of the k likeliest, before penalties and temperature."}
    )
    prompt_logprobs: int | None = field(
        default=None, metadata={"help": "None: none; k: of the prompt's tokens, and of the k likeliest in the place of each."}
    )
    n: int = field(default=1, metadata={"help": "Answers to the same prompt."})
    context: int | None = field(default=None, metadata={"help": "Tokens of prompt and answer together; left out, the window."})
    constraint: Constraint | None = field(
        default=None,
        metadata={"help": "The form of the answer: JSON, a JSON schema, a regular expression, a grammar, choices."},
    )

    def __post_init__(self) -> None:
        """Check every field; tuples for sequences."""
        if self.stop is not None:
            stop = (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop, "a text or a list of texts; () is none")
            object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _listed("stop_token_ids", self.stop_token_ids, "a list of token ids; () is none"))
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias {shown(self.logit_bias)}: must be a mapping from token ids to numbers; {{}} is none")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        self._check_distribution()
        self._check_ends()

    def _check_distribution(self) -> None:
        if self.temperature is not None:
            _number("temperature", self.temperature, "between 0 (greedy) and 100", 0, 100)
        if self.top_k is not None:
            _whole("top_k", self.top_k, "0 (off) or a whole number above it", 0)
        if self.top_p is not None:
            _number("top_p", self.top_p, "above 0 and at most 1 (off)", 0, 1, open_low=True)
        if self.min_p is not None:
            _number("min_p", self.min_p, "between 0 (off) and 1", 0, 1)
        if self.repetition_penalty is not None:
            _number("repetition_penalty", self.repetition_penalty, "between 0.01 and 100; 1 is off", 0.01, 100)
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), "between -2 and 2; 0 is off", -2, 2)
        if self.penalty_window is not None:
            _whole("penalty_window", self.penalty_window, "-1 (all), or a whole number from 0 (none)", -1)
        for token, bias in self.logit_bias.items():
            _whole("logit_bias for token", token, "given by token id, a whole number of at least 0", 0)
            _number(f"logit_bias of token {shown(token)}", bias, "between -10000 and 10000", -10_000, 10_000)
        if self.seed is not None:
            _whole("seed", self.seed, "a whole number of 64 bits", -(2**63), 2**63 - 1)

    def _check_ends(self) -> None:
        for text in self.stop or ():
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop {shown(text)}: must be a text of at least one character")
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, "token ids, whole numbers of at least 0", 0)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos {shown(self.ignore_eos)}: must be True or False")
        if self.context is not None:
            _whole("context", self.context, "a whole number of at least 1", 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, "a whole number of at least 0", 0)
        if self.prompt_logprobs is not None:
            _whole("prompt_logprobs", self.prompt_logprobs, "a whole number of at least 0", 0)
        _whole("n", self.n, f"a whole number from 1 to {MOST_SAMPLES}", 1, MOST_SAMPLES)
        if self.max_tokens is not None and (self.max_tokens != 0 or self.prompt_logprobs is None):
            _whole("max_tokens", self.max_tokens, "a whole number of at least 1", 1)
        if self.max_tokens == 0 and self.n > 1:
            raise ValueError(f"n {self.n}: must be 1 where max_tokens is 0, since nothing is written")
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise ValueError(f"constraint {shown(self.constraint)}: must be a Constraint; in settings and JSON, its kind and text")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> SamplingParams:
        """Read from named values (settings, JSON); a name that is not a field is a ValueError that lists those that are."""
        names = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"sampling parameter {', '.join(unknown)}: unknown; there are {', '.join(names)}")
        constraint = values.get("constraint")
        return cls(**{**values, "constraint": None if constraint is None else Constraint.read(constraint)})  # type: ignore[arg-type]

    def resolve(self, defaults: GenerationDefaults, room: int | None = None) -> ResolvedParams:
        """Every None replaced: by the model's default, by a drawn seed, and max_tokens by the `room` that the window leaves."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in DEFAULTED:
            if chosen[name] is None:
                chosen[name] = getattr(defaults, name)
        if room is not None:
            chosen["max_tokens"] = room if chosen["max_tokens"] is None else min(room, chosen["max_tokens"])
        if chosen["seed"] is None and chosen["temperature"] > 0:
            chosen["seed"] = secrets.randbits(SEED_BITS)
        return ResolvedParams(**chosen)


@dataclass(frozen=True)
class ResolvedParams(SamplingParams):
    """Sampling parameters with nothing left open: what was really used."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = -1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability as the model gives it, before penalties, bias, temperature and cuts."""

    token_id: int
    logprob: float
    rank: int  # 1 for the likeliest
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens (id, logprob), best first


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt, token by token."""

    tokens: tuple[TokenLogprob, ...]

    @property
    def logprob(self) -> float:
        """Of all of it."""
        return sum(token.logprob for token in self.tokens)

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest in its place, so that the model would have written it."""
        return all(token.rank == 1 for token in self.tokens)


@dataclass(frozen=True)
class Usage:
    """Counts in tokens; `cached_tokens` of the prompt were not read again because an earlier request had read them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds from admission to the first token, and from there to the last."""

    prompt_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Output:
    """A whole answer. `token_ids` holds every sampled token, the one that ended it included; `text` ends before it."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    params: ResolvedParams
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # of every token of the prompt, None of the first
    stopped_by: str | int | None = None  # the stop string or token id that ended it
    content: str | None = None  # of chat with tools: the text outside the calls
    tool_calls: tuple[ToolCall, ...] = ()
    others: tuple[Output, ...] = ()  # samples 1 .. n-1

    @property
    def choices(self) -> tuple[Output, ...]:
        """All n samples, this one first."""
        return (replace(self, others=()), *self.others)


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer; the last one of a sample carries its `finish_reason` and the whole `output`."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0  # which of the n samples
    finish_reason: FinishReason | None = None
    output: Output | None = None
    deltas: tuple[Delta, ...] = ()  # of chat with tools: the piece as content and calls

    def __str__(self) -> str:
        """The text, so that a stream can be printed as it comes."""
        return self.text


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine. The prompt's final hidden states from row `read_from` on go to the `reader`.

    Where it is `only_read` that is all that is done. Those that read all of a text share no blocks with others: what comes once
    would only push out what comes again.
    """

    id: int
    prompt: list[int]
    params: ResolvedParams
    ends: frozenset[int] = frozenset()  # token ids that end an answer
    form: Compiled | None = None  # what holds its answers to the constraint, if there is one
    reader: Callable[[Tensor], None] | None = None  # (N, D) rows of consecutive prompt tokens
    read_from: int = 0
    only_read: bool = False
    scored: TextLogprobs | None = None  # the reader that makes `prompt_logprobs`
    outbox: deque[Chunk] = field(default_factory=deque)
    aborted: bool = False  # asked to end
    finished: bool = False  # has ended
    cached_tokens: int = 0
    error: Exception | None = None  # raised where the request is waited for
    adapter: ServedAdapter | None = None  # whose additions its tokens get
    asker: int = 0  # which of the models that share the engine it is for
    priority: int = 0  # the smaller, the sooner
    turn: int = 0  # of equal ones the smaller is served first: numbered as they are handed in, which may be long after they are made
    notify: Callable[[], None] | None = None  # called by the engine's thread when there is something in the outbox, or the end
    made: float = field(default_factory=time.perf_counter)  # clock readings, seconds
    admitted: float | None = None
    first_token: float | None = None

    @property
    def shares(self) -> bool:
        """Whether it takes blocks of earlier texts, and leaves its own to later ones."""
        return not self.only_read or self.read_from > 0

    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """What was found so far of the prompt's tokens, if that was asked for: all when the first token is written."""
        return None if self.scored is None else (None, *self.scored.found)
