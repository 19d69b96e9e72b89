"""Model text to content and calls: whole, in pieces cut anywhere, malformed, and back from what our renderer writes."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen2.tokenizer import ToolCall, fold
from qwen2.tokenizer.parse import HERMES, QWEN2, Delta, StreamParser


def parse(text, dialect=HERMES):
    parser = StreamParser(dialect)
    return fold([*parser.push(text), *parser.flush()])


CALL = '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>'
GET = ToolCall("get", '{"a": 1}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain", "plain", []),
        ("", "", []),
        (CALL, "", [GET]),
        ("Let me see.\n" + CALL, "Let me see.", [GET]),
        ("Let me see." + CALL, "Let me see.", [GET]),
        ("two\n\n" + CALL, "two\n", [GET]),
        (CALL + "\n" + CALL, "", [GET, GET]),
        (CALL + CALL + "\n\n ", "", [GET, GET]),
        ("a\n" + CALL + "\nafter", "aafter", [GET]),
        (CALL.removesuffix("\n</tool_call>"), "", [GET]),                       # the model ended its turn without closing
        ('<tool_call>{"arguments":{ "b" : [1,2.50e1] },"name":"x"}</tool_call>', "", [ToolCall("x", '{ "b" : [1,2.50e1] }')]),
        ('<tool_call>\n{"name": "x", "arguments": {"s": "</tool_call>"}}\n</tool_call>', "", [ToolCall("x", '{"s": "</tool_call>"}')]),
        (r'<tool_call>{"name": "x", "arguments": {"s": "\"</tool_call>"}}</tool_call>', "", [ToolCall("x", r'{"s": "\"</tool_call>"}')]),
        ('<tool_call>{"name": "x", "arguments": "{\\"q\\": 1}"}</tool_call>', "", [ToolCall("x", '{"q": 1}')]),
        ("1 < 2 <tool_cal", "1 < 2 <tool_cal", []),
        ("a\n", "a\n", []),
    ],
)  # fmt: skip
def test_hermes(text, content, calls):
    message = parse(text)
    assert (message.content, message.tool_calls, message.problems) == (content, calls, [])


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("not json", "the call is not JSON"),
        ("", "the call is not JSON"),
        ('["get"]', "the call is not a JSON object"),
        ('{"arguments": {}}', "the call has no name"),
        ('{"name": "get"}', "the call has no arguments"),
        ('{"name": "get", "arguments": [1]}', "arguments is not a JSON object"),
        ('{"name": "get", "arguments": null}', "arguments is not a JSON object"),
        ('{"name": "get", "arguments": {"a": NaN}}', "NaN is not a JSON value"),
        ('{"name": "get", "arguments": "x"}', "arguments is not JSON"),
        ('{"name": 3, "arguments": {}}', "the name is not text"),
        ('{"name": "a b", "arguments": {}}', "'a b' is not the name of a tool"),
        ("{'name': 'it\"s', 'arguments': {}}\n", "the call is not JSON"),
        ('{"name": "get", "arguments": {"a": "b\n"}}', "the call is not JSON"),
        ('{"name": "get", "arguments": ' + '{"a":' * 100_000, "the call is not JSON"),
        ('{"name": "get", "arguments": {}} and more', "the call is not JSON"),
    ],
)
def test_a_malformed_call_is_content_with_a_reason(body, problem):
    text = f"before\n<tool_call>{body}</tool_call>"
    message = parse(text + "\n" + CALL)
    assert message.content == text
    assert message.tool_calls == [GET]
    assert len(message.problems) == 1
    assert message.problems[0].startswith("not a tool call: ")
    assert problem in message.problems[0]


def test_a_call_cut_off_is_content():
    message = parse("x\n" + CALL[:30])
    assert (message.content, message.tool_calls) == ("x\n" + CALL[:30], [])
    assert len(message.problems) == 1


AGENT = '✿FUNCTION✿: get\n✿ARGS✿: {"a": 1}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain ✿ ✿FUNCTION✿ x", "plain ✿ ✿FUNCTION✿ x", []),
        (AGENT, "", [GET]),
        ("I look.\n" + AGENT, "I look.", [GET]),
        (AGENT + "\n" + AGENT, "", [GET, GET]),
        (AGENT + "\n✿RESULT✿: invented\n✿RETURN✿: invented", "", [GET]),
        (AGENT + " <!-- a remark -->", "", [GET]),
        (": The answer is 3: good", "The answer is 3: good", []),
        (":\n" + AGENT, "", [GET]),
        (": \n" + AGENT, "", [GET]),
        (":", "", []),
        ("", "", []),
        ("all ✿RETURN✿: x", "all ", []),
        ('✿FUNCTION✿: get\n✿ARGS✿: {"a": "✿FUNCTION✿:"}', "", [ToolCall("get", '{"a": "✿FUNCTION✿:"}')]),
        ("cut ✿FUNC", "cut ✿FUNC", []),
    ],
)
def test_qwen_agent(text, content, calls):
    message = parse(text, QWEN2)
    assert (message.content, message.tool_calls, message.problems) == (content, calls, [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("✿FUNCTION✿: get", "the call has no ✿ARGS✿"),
        ("✿FUNCTION✿: get\n✿ARGS✿: {'a': 1}", "arguments is not JSON"),
        ("✿FUNCTION✿: get\n✿ARGS✿: ", "arguments is not JSON"),
        ("✿FUNCTION✿: a b\n✿ARGS✿: {}", "'a b' is not the name of a tool"),
    ],
)
def test_a_malformed_qwen_agent_call_is_content_with_a_reason(text, problem):
    message = parse("so\n" + text + "\n" + AGENT, QWEN2)
    assert message.content == "so\n" + text + "\n"
    assert message.tool_calls == [GET]
    assert problem in message.problems[0]


PIECES = {
    HERMES.open: [
        CALL, "<tool_call>", "</tool_call>", "\n", '{"name": "g", "arguments": {"s": "', '"}}', "\\", '"', "text ", "<", "<tool", ": ",
    ],
    QWEN2.open: [
        AGENT, "✿FUNCTION✿:", "✿ARGS✿:", "✿RESULT✿", "✿RETURN✿", "\n", ' {"a": "', '"}', "\\", '"', "text ", "✿", ": ", ":", "FUNCTION",
    ],
}  # fmt: skip


@pytest.mark.parametrize("dialect", [HERMES, QWEN2], ids=["hermes", "qwen2"])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_text_cut_anywhere_parses_as_the_whole(dialect, data):
    text = data.draw(st.lists(st.sampled_from(PIECES[dialect.open]) | st.text(max_size=3), max_size=12).map("".join))
    whole = parse(text, dialect)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    for bounds in ([0, *cuts, len(text)], range(len(text) + 1)):
        parser = StreamParser(dialect)
        deltas = [delta for a, b in pairwise(bounds) for delta in parser.push(text[a:b])]
        assert fold([*deltas, *parser.flush()]) == whole
    for call in whole.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text())
@example("<tool_call>", "</tool_call>")
@example("✿FUNCTION✿:", ": ")
def test_without_a_dialect_all_is_content(a, b):
    parser = StreamParser(None)
    assert "".join(d.content for d in [*parser.push(a), *parser.push(b), *parser.flush()]) == a + b


def test_content_streams_at_once_and_only_a_possible_marker_waits():
    parser = StreamParser(HERMES)
    assert parser.push("I look") == [Delta("I look")]
    assert parser.push(" it up.\n") == [Delta(" it up.")]
    assert parser.push("<tool_") == []
    assert parser.push("x") == [Delta("\n<tool_x")]
    assert parser.push("<tool_call>") == []
    assert parser.push('{"name": "get", "arguments": {"a": 1}}') == []
    assert parser.push("</tool_call>") == [Delta(call=GET)]
    assert parser.push("\n") == []
    assert parser.flush() == []


def test_qwen_agent_content_streams_at_once():
    parser = StreamParser(QWEN2)
    assert parser.push(":") == []
    assert parser.push(" so") == [Delta("so")]
    assert parser.push(" ✿") == [Delta(" ")]
    assert parser.push("!") == [Delta("✿!")]


def test_a_long_body_of_quotes_is_read_in_one_pass():
    """A hundred thousand strings inside one call: a scan that starts again at each of them would not end."""
    arguments = json.dumps({"a": ["</tool_call>"] * 100_000})
    message = parse(f'<tool_call>{{"name": "x", "arguments": {arguments}}}</tool_call>')
    assert message.tool_calls == [ToolCall("x", arguments)]
