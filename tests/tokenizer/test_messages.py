"""What a conversation may look like, and the words in which anything else is refused."""

from __future__ import annotations

import pytest

from qwen2.tokenizer.messages import ToolCall, Turn, read_messages, read_tools

USER = {"role": "user", "content": "x"}


def call(**changes: object) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "get", "arguments": {}}} | changes]}


def test_calls_keep_the_text_of_their_arguments():
    turns = read_messages([USER, call(function={"name": "get", "arguments": ' {"b":1.50,  "a":"é"}\n'})])
    assert turns[1] == Turn("assistant", "", (ToolCall("get", '{"b":1.50,  "a":"é"}'),), call_ids=("1",))
    turns = read_messages([USER, call(function={"name": "get", "arguments": {"b": 1.5, "a": "é"}})])
    assert turns[1].calls == (ToolCall("get", '{"b": 1.5, "a": "é"}'),)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hello", "messages is a list of objects with role and content, got str"),
        (USER, "messages is a list of objects with role and content, got dict"),
        (["x"], r"messages\[0\] is str, not an object"),
        ([{"role": "wizard", "content": "x"}], r"messages\[0\]: unknown role 'wizard'; roles are system, user, assistant, tool"),
        ([{"content": "x"}], "unknown role None"),
        ([USER, USER | {"colour": 1}], r"messages\[1\] has the unknown key 'colour'; known are content, name, role"),
        ([{"role": "user"}], r"messages\[0\].content is NoneType, not text"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\] is not a text part"),
        ([{"role": "assistant", "content": None}], r"messages\[0\].content is NoneType, not text"),
        ([USER | {"name": 5}], r"messages\[0\].name is int, not text"),
        ([USER | {"tool_calls": call()["tool_calls"]}], r"messages\[0\]: only an assistant has tool_calls, not 'user'"),
        ([USER | {"tool_call_id": "1"}], r"messages\[0\]: only a tool result has a tool_call_id, not 'user'"),
        ([{"role": "assistant", "tool_calls": "x"}], r"messages\[0\].tool_calls is str, not a list"),
        ([{"role": "assistant", "tool_calls": ["x"]}], r"messages\[0\].tool_calls\[0\] is str, not an object with a function"),
        ([call(extra=0)], r"tool_calls\[0\] has the unknown key 'extra'; known are function, id, index, type"),
        ([call(type="code")], r"tool_calls\[0\].type is 'code'; only 'function' is known"),
        ([call(function={"name": "get"})], r"tool_calls\[0\].function is an object with exactly name and arguments"),
        ([call(function={"name": 'a"b', "arguments": {}})], r"""name is 'a"b'; a tool's name is 1 to 64 letters"""),
        ([call(function={"name": "get", "arguments": "{"})], r"function.arguments is not JSON"),
        ([call(function={"name": "get", "arguments": "[1]"})], r"function.arguments is not a JSON object"),
        ([call(function={"name": "get", "arguments": '{"a": Infinity}'})], "Infinity is not a JSON value"),
        ([call(function={"name": "get", "arguments": 5})], "arguments are an object or its JSON text"),
        ([call(function={"name": "get", "arguments": {"a": {1, 2}}})], "cannot be written as JSON"),
        ([call(function={"name": "get", "arguments": {"a": float("nan")}})], "cannot be written as JSON"),
    ],
)
def test_what_is_no_conversation(messages, message):
    with pytest.raises(ValueError, match=message):
        read_messages(messages)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("x", "tools is a list of objects"),
        ([{"name": "get"}], r'tools\[0\] is not {"type": "function", "function"'),
        ([{"type": "retrieval", "function": {"name": "x"}}], r"tools\[0\] is not"),
        ([{"type": "function", "function": {"name": "a b"}}], "a tool's name is"),
        ([{"type": "function", "function": {"name": "get", "description": 5}}], r"tools\[0\].function.description is int, not text"),
        ([{"type": "function", "function": {"name": "get", "parameters": {"x": object()}}}], "cannot be written as JSON"),
    ],
)
def test_what_is_no_tool(tools, message):
    with pytest.raises(ValueError, match=message):
        read_tools(tools)


def test_no_tools():
    assert read_tools(None) == read_tools([]) == []


def test_text_parts_are_text():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert read_messages([{"role": "user", "content": parts}])[0].content == "one\ntwo"
    image = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(ValueError, match=r"messages\[0\].content\[1\] is not a text part, .*: these models read text only"):
        read_messages([{"role": "user", "content": [parts[0], image]}])
