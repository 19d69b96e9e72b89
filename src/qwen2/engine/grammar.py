"""Constraints turned into masks of allowed tokens, by llguidance, which is imported when the first is asked for.

A constraint is compiled for every request (`Grammars`, one per engine) and copied for every sample (`Matcher`), which advances by the
tokens that are really written. The library is given our tokenizer's bytes. Control tokens have none, so no grammar reaches one, but
the brackets of calls, which only those of tools do (calls.py); the end of an answer is one made-up token behind the vocabulary, and
what it stands for is each request's own: its end tokens, or nothing at all where the grammar allows nothing else.
Measured beside xgrammar by bench/grammar.py; docs/LOG.md says why this one.

White space between the parts of a JSON text is at most one blank, or a line's end and its indentation, so that a model that likes
blanks still ends. Inside strings at most BLANKS tokens of nothing but blanks follow each other; text beside calls is free.

Left out: tokens that a grammar forces are still computed by the model, one step each; log-probabilities of the masked model.

    matcher = Grammars(tokenizer, vocab).compiled(Constraint.regex("[0-9]+")).matcher(ends=[151645])
    logits, ids = matcher.narrow(row)                      # (C,), (C,) or None for all tokens; row (V,) is left as it is
    matcher.accept(token); matcher.complete
"""

# V vocabulary without padding rows, C tokens that are allowed

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qwen2.engine.calls import lark
from qwen2.engine.constraint import Constraint, ConstraintError
from qwen2.tokenizer import HERMES

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

    from qwen2.tokenizer import Tokenizer

TRIAL = Path(__file__).with_name("grammar_trial.py")
START_SECONDS = 30.0  # for a Python process to start on a busy machine
TRIAL_SECONDS = 3.0  # of the processor, so that a verdict, which is remembered, does not depend on who else is at work
TRIAL_MEMORY = 1 << 30  # bytes of address space
LIMITS: dict[str, Any] = {"max_lexer_states": 100_000, "verbose_errors": False}  # of one request: 34 MB were measured for 50,000
JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r" |\n {0,64}", "lenient": False, "coerce_one_of": False}
MOST_KEPT, MOST_KEPT_CHARACTERS = 256, 2**21  # of grammars that have been tried, and of those that failed
BLANKS = 32
BRACKETS = tuple(text for text in (HERMES.open, HERMES.close) if text)  # that are tokens in some vocabularies
TRIAL_BRACKETS = dict(zip(BRACKETS, (257, 258), strict=True))  # ids in grammar_trial.py
SPARSE = 8  # where fewer than one token in so many is allowed, only these are looked at
SHOWN_CHARACTERS = 300
TOLD = {  # how some of the library's messages begin, and what they mean
    "oneOf constraints are not supported": "oneOf: its options are not provably apart; use anyOf, or tell them apart by a const",
    "NoExtensionBias": "no text has this form",
    "lexer error: too many states": "more than is kept of it; leave upper bounds such as maxLength or {1,9999} out, or set max_tokens",
}


TRIES_HERE = ContextVar("tries_here", default=True)


class UntriedError(Exception):
    """A constraint that has to be tried first, which takes a process and up to seconds; `grammars.tried(constraint)` does it."""

    def __init__(self, grammars: Grammars, constraint: Constraint) -> None:
        super().__init__(f"{constraint.kind}: not tried yet")
        self.grammars, self.constraint = grammars, constraint


@contextmanager
def no_trials() -> Iterator[None]:
    """Within it nothing is tried: UntriedError instead, for those who count how many trials run at once."""
    before = TRIES_HERE.set(False)
    try:
        yield
    finally:
        TRIES_HERE.reset(before)


class Compiled:
    """A constraint as the library holds it, at its beginning; for one request, whose samples share the states that grow."""

    def __init__(self, start: LLMatcher, vocabulary: Vocabulary, kind: str) -> None:
        self.start, self.vocabulary, self.kind = start, vocabulary, kind

    def matcher(self, ends: Collection[int]) -> Matcher:
        """For one sample of a request that ends with these tokens."""
        return Matcher(self.start.deep_copy(), self.vocabulary, ends, self.kind)


class Vocabulary:
    """Our tokens as the library wants them."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        import llguidance

        self.size = size
        self.brackets = {text: tokenizer.control[text] for text in BRACKETS if tokenizer.control.get(text, size) < size}
        reached = set(self.brackets.values())
        self.tokens = [b"" if tokenizer.is_control(i) and i not in reached else tokenizer.token_bytes(i) for i in range(size)]
        self.tokens.append(b"<end>")
        self.special_token_ids, self.eos_token_id, self.bos_token_id = [*reached, size], size, None
        self.encode = tokenizer.encode
        self.blank = np.array([token != b"" and not token.strip() for token in self.tokens[:size]])  # (V,)
        self.letter = self.tokens.index(b"a")  # which only free text goes on with wherever it stands
        wrapper = llguidance.TokenizerWrapper(self)
        self.library: LLTokenizer = llguidance.LLTokenizer(wrapper, n_vocab=size + 1, eos_token=size)

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of a text; the library's interface."""
        return self.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class Grammars:
    """Compiles the constraints of one tokenizer, and remembers which have been tried, and how that ended. From any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self.tokenizer, self.vocab = tokenizer, vocab
        self._vocabulary: Vocabulary | None = None
        self._tried: OrderedDict[Constraint, str | ConstraintError] = OrderedDict()  # in the library's notation
        self._lock = threading.Lock()  # not held while a grammar is compiled

    def vocabulary(self) -> Vocabulary:
        """The first call takes a second, in which no other thread of Python runs: servers call it while nobody asks them."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self.tokenizer, self.vocab)
            return self._vocabulary

    def compiled(self, constraint: Constraint) -> Compiled:
        """ValueError of one line where the library cannot enforce it, or where nothing, or only an empty text, has that form.

        UntriedError within `no_trials`, if it would have to be tried.

        Compiled anew for every request, in about a millisecond: the library's states grow as answers are written, up to a limit
        that all copies share, and one answer that reaches it must not end others.
        """
        return _begin(constraint.kind, self.tried(constraint), self.vocabulary())

    def tried(self, constraint: Constraint) -> str:
        """In the library's notation, tried in another process where somebody wrote it and it has not been tried lately."""
        brackets = self.vocabulary().brackets
        with self._lock:
            found = self._tried.pop(constraint, None)
        if found is None:
            found = translated(constraint, brackets)
            try:
                if _is_to_be_tried(constraint):
                    if not TRIES_HERE.get():
                        raise UntriedError(self, constraint)
                    _try_all(constraint, found, brackets)
            except ConstraintError as error:
                found = error
        with self._lock:
            self._tried[constraint] = found
            while len(self._tried) > MOST_KEPT or sum(_size(*pair) for pair in self._tried.items()) > MOST_KEPT_CHARACTERS:
                self._tried.popitem(last=False)
        if isinstance(found, ConstraintError):
            raise ConstraintError(*found.args)
        return found


def _size(constraint: Constraint, found: str | ConstraintError) -> int:
    """Characters that are kept of what has been tried."""
    return len(found) if isinstance(found, str) else len(constraint.text)


def _is_to_be_tried(constraint: Constraint) -> bool:
    """Whether somebody wrote it whom nothing is known of; calls without schemas and choices are ours."""
    if constraint.kind == "call":
        return any(schema is not None for schema in constraint.parsed()["tools"].values())
    return constraint.kind in ("json_schema", "regex", "grammar")


def _begin(kind: str, grammar: str, vocabulary: Vocabulary) -> Compiled:
    """The grammar compiled, and its first mask, which builds more of it, computed."""
    import llguidance

    start = llguidance.LLMatcher(vocabulary.library, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    allowed, may_end = _mask(start, vocabulary, kind)
    if not allowed.any():
        empty = "only the empty text has this form" if may_end and start.is_accepting() else "no text has this form"
        raise ConstraintError(f"{kind}: {empty}; an answer needs at least one token")
    return Compiled(start, vocabulary, kind)


def translated(constraint: Constraint, brackets: Mapping[str, int] = MappingProxyType({})) -> str:
    """The constraint in the library's notation. `brackets`: those that are tokens, with their ids."""
    from llguidance import LLMatcher

    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "grammar":
        return LLMatcher.grammar_from_lark(constraint.text)
    if constraint.kind == "call":
        named = {text: f"<[{token}]>" for text, token in brackets.items()}
        return LLMatcher.grammar_from_lark(lark(constraint.parsed(), named, JSON_OPTIONS))
    if constraint.kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in constraint.parsed()))
    schema = {"type": "object"} if constraint.kind == "json_object" else constraint.parsed()
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConstraintError(f"{constraint.kind}: {_one_line(str(error))}") from None


def _try_all(constraint: Constraint, grammar: str, brackets: Collection[str]) -> None:
    """ConstraintError where it cannot be compiled within the limits. OSError where that cannot be found out just now."""
    if constraint.kind == "call":
        _try_calls(constraint, brackets)
    else:
        _try(constraint.kind, grammar)


def _try(kind: str, grammar: str) -> None:
    """ConstraintError where the grammar cannot be compiled within the limits (grammar_trial.py)."""
    job = {"grammar": grammar, "limits": LIMITS, "seconds": TRIAL_SECONDS, "memory": TRIAL_MEMORY}
    command = [sys.executable, str(TRIAL)]
    try:
        done = subprocess.run(command, input=json.dumps(job) + "\n", capture_output=True, text=True, timeout=START_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise OSError(f"the process that tries grammars does not start: {' '.join(command)}") from None
    if done.stdout:
        error = json.loads(done.stdout)["error"]
    elif -done.returncode == signal.SIGKILL:
        raise OSError(f"the process that tries grammars was killed, perhaps for lack of memory: {' '.join(command)}")
    elif -done.returncode == getattr(signal, "SIGPROF", None) or "Timeout (" in done.stderr:  # the watchdog's first word
        error = f"not compiled within {TRIAL_SECONDS:g} s; make it simpler"
    else:
        error = f"broke the process that tried it, which may use {TRIAL_MEMORY >> 20} MiB ({done.stderr[-80:]!r}); make it simpler"
    if error:
        raise ConstraintError(f"{kind}: {_one_line(error)}")


def _try_calls(constraint: Constraint, brackets: Collection[str]) -> None:
    """The same for calls; the error names the tool whose schema cannot be compiled alone, if there is one."""
    schemas = {name: schema for name, schema in constraint.parsed()["tools"].items() if schema is not None}
    end = time.monotonic() + 3 * TRIAL_SECONDS  # of hundreds of tools not each is tried for seconds
    try:
        _try("call", translated(constraint, {text: TRIAL_BRACKETS[text] for text in brackets}))
    except ConstraintError as error:
        for name, schema in schemas.items():
            if time.monotonic() > end:
                break
            try:
                _try("json_schema", translated(Constraint.json_schema(schema)))
            except ConstraintError as reason:
                raise ConstraintError(f"tool {name!r}: its parameters: {str(reason).removeprefix('json_schema: ')}") from None
        raise ConstraintError(f"the tools together: {str(error).removeprefix('call: ')}") from None


def _mask(matcher: LLMatcher, vocabulary: Vocabulary, kind: str) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], bool]:
    """Which tokens are allowed next (V,), and whether the text may end here."""
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)  # the interpreter is free meanwhile
    if matcher.is_error():
        raise ConstraintError(f"{kind}: {_one_line(matcher.get_error())}")
    flags = np.unpackbits(bits, count=vocabulary.size + 1, bitorder="little").view(np.bool_)
    if kind != "call":
        flags[list(vocabulary.brackets.values())] = False  # whatever is not something may be anything else
    return flags[:-1], bool(flags[-1])


class Matcher:
    """Where one answer stands in its grammar. `complete`: nothing may follow, the answer ends. `free`: in text beside calls."""

    def __init__(self, state: LLMatcher, vocabulary: Vocabulary, ends: Collection[int], kind: str) -> None:
        self.state, self.vocabulary = state, vocabulary
        self.ends = frozenset(end for end in ends if end < vocabulary.size)
        self.kind = {"json_object": "json", "json_schema": "json", "call": "call"}.get(kind, "grammar")
        self.blanks = 0  # tokens of nothing but blanks, just now
        self.complete, self.free = False, self._in_text()

    def _in_text(self) -> bool:
        """Whether text beside calls may go on, which may also end anywhere."""
        return self.kind == "call" and self.state.is_accepting() and self.state.validate_tokens([self.vocabulary.letter]) == 1

    def allows(self, token: int) -> bool:
        """Whether a token, or an end, may come next in free text."""
        return self.state.is_accepting() if token in self.ends else self.state.validate_tokens([token]) == 1

    def surely_allows(self, token: int) -> bool:
        """Whether a token may come next, much cheaper than all that may. False for those of which only all of them tell."""
        return not self._depends(token) and self.state.validate_tokens([token]) == 1

    def _depends(self, token: int) -> bool:
        """Whether it depends on what else is allowed: ends, and blanks after many."""
        return token in self.ends or bool(self.blanks >= BLANKS and self.vocabulary.blank[token])

    def take(self, token: int) -> bool:
        """Advance by a token if it is surely allowed."""
        if self._depends(token) or not self.state.try_consume_tokens([token]):
            return False
        self._advanced(token)
        return True

    def narrow(self, row: Tensor) -> tuple[Tensor, Tensor | None]:
        """row (V,) -> logits (C,) of tokens that are allowed and their ids, or all of them (None), the others -inf."""
        allowed = self.allowed()
        count = int(np.count_nonzero(allowed))
        if count * SPARSE < len(allowed):
            ids = torch.from_numpy(np.flatnonzero(allowed)).to(row.device)
            logits, chosen = row[ids], ids
        else:
            logits, chosen = row.masked_fill(torch.from_numpy(~allowed).to(row.device), -torch.inf), None
        if not bool(logits.amax() > -torch.inf):  # NaN is not either
            raise FloatingPointError(f"logits of all {count:,} tokens that its {self.kind} allows are {float(logits.amax())}")
        return logits, chosen

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which tokens may come next (V,), the end tokens among them where the text may end."""
        allowed, may_end = _mask(self.state, self.vocabulary, self.kind)
        if self.blanks >= BLANKS:
            less = allowed & ~self.vocabulary.blank
            allowed = less if less.any() or may_end else allowed
        if may_end and self.state.is_accepting():
            allowed[list(self.ends)] = True
        if not allowed.any():
            raise ConstraintError(f"{self.kind}: it allows no token here, and no end; it has no finite text that begins like the answer")
        return allowed

    def accept(self, token: int) -> None:
        """Advance by a token that was written."""
        if token in self.ends:
            return
        if not self.state.consume_token(token):
            raise ConstraintError(f"{self.kind}: {_one_line(self.state.get_error())}")
        self._advanced(token)

    def _advanced(self, token: int) -> None:
        self.free = self._in_text()
        self.blanks = self.blanks + 1 if self.kind != "grammar" and not self.free and self.vocabulary.blank[token] else 0
        if not self.free and self.state.is_accepting():  # rare: at an answer's end, and inside a number or a text without bound
            self.complete = self.state.is_stopped() or not _mask(self.state, self.vocabulary, self.kind)[0].any()


def _one_line(message: str) -> str:
    """The library's message without its state and its drawings."""
    message = next((meant for beginning, meant in TOLD.items() if message.startswith(beginning)), message)
    line = " ".join(message.partition("<state>")[0].partition("<backtrace>")[0].split())
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + "..."
