"""Calls that are forced, and strict ones that are not: that every one is valid, that answers end, and that nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from qwen2.engine import grammar as grammar_module
from qwen2.engine.constraint import Constraint
from qwen2.engine.grammar import Grammars
from qwen2.tokenizer import DIALECTS, Parts, StreamParser, Tokenizer, fold
from qwen2.tokenizer.alphabet import CHAR_OF_BYTE
from tests.engine.conftest import EOS, byte_tokenizer
from tests.engine.schemas import LEAVES, arrays, choices, objects

V = 305
MOST_TOKENS = 6000
OPEN, CLOSE = 303, 304  # the brackets, where they are tokens
FLOWER = "\u273fFUNCTION\u273f:"


def spelled_tokenizer() -> Tokenizer:
    """The same without brackets: they are text."""
    control = {"<|endoftext|>": 300, "<|im_start|>": 301, "<|im_end|>": EOS}
    return Tokenizer.from_parts(Parts({char: byte for byte, char in CHAR_OF_BYTE.items()}, [], control, eos=(EOS,), pad=300))


# How calls are written: the dialect, whether its brackets are tokens
WAYS = {"hermes": ("hermes", byte_tokenizer), "hermes spelled": ("hermes", spelled_tokenizer), "qwen2": ("qwen2", byte_tokenizer)}


@pytest.fixture(scope="module")
def ways():
    return {way: (form, Grammars(make(), make().vocab_size)) for way, (form, make) in WAYS.items()}


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """No process for each grammar, which would take minutes; what it refuses is tested with one."""
    monkeypatch.setattr(grammar_module, "_try", lambda kind, grammar: None)


def random_rows(seed, size, prefer="", opens=0.0, ends=3.0):
    """Rows of random logits that like to close what is open, prefer some characters, and like to open calls so much."""
    generator = torch.Generator().manual_seed(seed)
    bonus = torch.zeros(size)
    bonus[list(b'"}]')] = 2.5
    bonus[EOS] = ends
    bonus[list(prefer.encode())] = 100.0
    if size > OPEN:
        bonus[OPEN] = opens
    for _ in range(MOST_TOKENS):
        yield torch.randn(size, generator=generator) + bonus


def write(matcher, rows, tokenizer):
    """The text of an answer that takes the largest allowed logit of each row; None where it does not end."""
    decoder, text = tokenizer.decoder(), ""
    for row in rows:
        logits, ids = matcher.narrow(row)
        token = int(logits.argmax()) if ids is None else int(ids[logits.argmax()])
        if token == EOS:
            return text + decoder.flush()
        assert token < 256 or token in (OPEN, CLOSE), "a control token, or one that stands for nothing"
        text += decoder.push(token)
        matcher.accept(token)
        if matcher.complete:
            return text + decoder.flush()
    return None


def parsed(text, form):
    """The whole, and cut at every character: the same."""
    whole = StreamParser(DIALECTS[form])
    message = fold([*whole.push(text), *whole.flush()])
    pieces = StreamParser(DIALECTS[form])
    assert fold([*[delta for char in text for delta in pieces.push(char)], *pieces.flush()]) == message
    return message


# --- every call is valid

INNER = st.recursive(LEAVES, lambda inner: st.one_of(objects(inner), arrays(inner), choices(inner)), max_leaves=5)
PARAMETERS = st.builds(lambda schema: {"$defs": {"leaf": {"type": "string", "maxLength": 6}}, **schema}, objects(INNER))
TOOL_NAMES = ["get", "get_all", "a-b.c", "\u5929\u6c14", "x" * 64]
TOOLS = st.lists(st.tuples(st.sampled_from(TOOL_NAMES), PARAMETERS), min_size=1, max_size=3, unique_by=lambda pair: pair[0]).map(dict)


def check(message, tools):
    assert not message.problems
    for call in message.tool_calls:
        Draft202012Validator(tools[call.name] or {"type": "object"}).validate(json.loads(call.arguments))


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(tools=TOOLS, way=st.sampled_from(list(WAYS)), parallel=st.booleans(), seed=st.integers(0, 999))
def test_500_forced_answers_are_valid_calls(ways, tools, way, parallel, seed):
    form, grammars = ways[way]
    held = grammars.compiled(Constraint.call(tools, form, forced=True, parallel=parallel)).matcher([EOS])
    text = write(held, random_rows(seed, grammars.vocab), grammars.tokenizer)
    assert text is not None, "it does not end"
    message = parsed(text, form)
    check(message, tools)
    assert not message.content
    assert len(message.tool_calls) == 1 if not parallel else message.tool_calls
