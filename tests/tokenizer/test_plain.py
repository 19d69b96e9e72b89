"""Calls that a model writes as plain JSON: which answers are calls, which are text, and that the stream says the same as the whole."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.tokenizer import ToolCall, fold
from qwen2.tokenizer.parse import HERMES, Delta, StreamParser
from qwen2.tokenizer.plain import PlainCalls

NAMES = ("get", "get_all", "add")
GET = ToolCall("get", '{"a": 1}')
ADD = ToolCall("add", '{\n    "a": 17.5,\n    "b": 4\n  }')
BARE = '{"name": "get", "arguments": {"a": 1}}'
# as Qwen2.5-Coder of 0.5B and 1.5B wrote it
CODER = '```json\n{\n  "name": "add",\n  "arguments": {\n    "a": 17.5,\n    "b": 4\n  }\n}\n```'
HERMES_CALL = f"<tool_call>\n{BARE}\n</tool_call>"


def parse(text, one=False, names=NAMES):
    parser = StreamParser(HERMES, plain=PlainCalls(names, one))
    return fold([*parser.push(text), *parser.flush()])


def fenced(body, language="json"):
    return f"```{language}\n{body}\n```"


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (CODER, [ADD]),
        (BARE, [GET]),
        (f"\n {BARE}\n", [GET]),
        (fenced(BARE), [GET]),
        (fenced(BARE, ""), [GET]),
        (f"```json {BARE} ```\n", [GET]),
        (f"\n{CODER}\n\n", [ADD]),
        ('{"arguments": {"a": 1}, "name": "get"}', [GET]),
        (f"[{BARE}, {BARE}]", [GET, GET]),
        (fenced(f"[\n  {BARE}\n]"), [GET]),
        ('{"name": "get_all", "arguments": {}}', [ToolCall("get_all", "{}")]),
        ('{"name": "get", "arguments": {"s": "```\\n}]\\" x"}}', [ToolCall("get", '{"s": "```\\n}]\\" x"}')]),
        (fenced('{"name": "get", "arguments": {"s": "a```b"}}'), [ToolCall("get", '{"s": "a```b"}')]),
        ('{"name": "get", "arguments": {"n": 1.50e1, "x": [{}, []]}}', [ToolCall("get", '{"n": 1.50e1, "x": [{}, []]}')]),
    ],
)
def test_an_answer_that_is_nothing_but_calls(text, calls):
    message = parse(text)
    assert (message.content, message.tool_calls, message.problems) == ("", calls, [])


TEXTS = [
    "plain",
    "",
    "  \n",
    "```",
    "```python\nprint(1)\n```",
    fenced('{"name": "John", "age": 30}'),
    fenced('{"name": "other", "arguments": {}}'),
    '{"name": "ge", "arguments": {}}',
    '{"name": "get"}',
    '{"name": "get", "arguments": {}, "id": 1}',
    '{"name": "get", "arguments": "{}"}',
    '{"name": "get", "arguments": [1]}',
    '{"name": "get", "arguments": {"a": NaN}}',
    '{"name": "get", "arguments": {"a": 1',
    '{"name": "get", "arguments": {}} and more',
    '{"name": "get", "arguments": {}}}',
    f"Here you are:\n{CODER}",
    f"{CODER}\nThis adds the two.",
    f"{CODER}\n{CODER}",
    f"{BARE}\n{BARE}",
    f"{BARE}```",
    f"[{BARE}, 3]",
    f"[{BARE}",
    "[]",
    fenced(BARE, "python"),
    fenced(BARE).removesuffix("```"),
    fenced(BARE).removeprefix("```json\n"),
    f"````json\n{BARE}\n````",
    '{"name": "get", "arguments": ' + '{"a":' * 100_000,
]


@pytest.mark.parametrize("text", TEXTS, ids=[text[:40] for text in TEXTS])
def test_anything_else_is_text_word_for_word(text):
    message = parse(text)
    assert (message.content, message.tool_calls) == (text, [])


def test_calls_in_the_format_itself_are_found_behind_what_looked_like_one():
    assert parse(f"{HERMES_CALL}").tool_calls == [GET]
    message = parse(f'{{"name": "get", "arguments": {{\n{HERMES_CALL}')
    assert (message.content, message.tool_calls) == ('{"name": "get", "arguments": {', [GET])
    message = parse(f"{CODER}\n{HERMES_CALL}")
    assert (message.content, message.tool_calls) == (CODER, [GET])


def test_where_one_call_may_be_made_a_list_is_text():
    assert parse(BARE, one=True).tool_calls == parse(fenced(BARE), one=True).tool_calls == [GET]
    for text in (f"[{BARE}]", fenced(f"[{BARE}, {BARE}]")):
        assert (parse(text, one=True).content, parse(text, one=True).tool_calls) == (text, [])


PIECES = [
    BARE,
    CODER,
    HERMES_CALL,
    "```json",
    "```",
    "\n",
    "[",
    ", ",
    "]",
    "{",
    "}",
    '"name": "get"',
    '"arguments": {',
    '"',
    "\\",
    "text ",
    " ",
]


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_any_text_cut_anywhere_parses_as_the_whole(data):
    text = data.draw(st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=8).map("".join))
    one = data.draw(st.booleans())
    whole = parse(text, one)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    for bounds in ([0, *cuts, len(text)], range(len(text) + 1)):
        parser = StreamParser(HERMES, plain=PlainCalls(NAMES, one))
        deltas = [delta for a, b in pairwise(bounds) for delta in parser.push(text[a:b])]
        assert fold([*deltas, *parser.flush()]) == whole
    for call in whole.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)
    if not whole.tool_calls and "<tool_call>" not in text:
        assert whole.content == text


def test_text_is_let_go_as_soon_as_it_can_be_no_call():
    def given_out(pieces):
        parser = StreamParser(HERMES, plain=PlainCalls(NAMES))
        return [fold(parser.push(piece)).content for piece in pieces]

    assert given_out(["Hello", " you"]) == ["Hello", " you"]
    assert given_out(["``", "`py", "thon"]) == ["", "```py", "thon"]
    assert given_out(["```json\n", '{"us', 'ers": 1']) == ["", '```json\n{"us', 'ers": 1']
    assert given_out(['{"name": "get', "_", 'x"', ": 1"]) == ["", "", '{"name": "get_x"', ": 1"]
    assert given_out([BARE, "\n", "So"]) == ["", "", BARE + "\nSo"]
    assert given_out([CODER, "\nThis", " adds"]) == ["", CODER + "\nThis", " adds"]
    parser = StreamParser(HERMES, plain=PlainCalls(NAMES))
    assert parser.push(CODER) == []
    assert parser.flush() == [Delta(call=ADD)]
