"""Anthropic's dialect through its own client and bare requests."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from qwen2 import LLM, SamplingParams
from qwen2.engine.asked import Asked
from qwen2.server.anthropic import Prompt, conversation
from tests.server.conftest import NAME, Running

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0}  # the client knows it no more, the interface does
TOOLS: list[Any] = [
    {"name": "weather", "description": "Of a place", "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}}}
]


@pytest.fixture
def client(running: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)


def test_the_message_is_the_engines_answer(client: anthropic.Anthropic, llm: LLM) -> None:
    answer = client.messages.create(model=NAME, max_tokens=12, messages=MESSAGES, system="Be brief", extra_body=GREEDY)
    right = llm.chat([{"role": "system", "content": "Be brief"}, *MESSAGES], SamplingParams(temperature=0, max_tokens=12))
    assert [block.text for block in answer.content if block.type == "text"] == [right.text]
    assert answer.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[right.finish_reason]
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (right.usage.prompt_tokens, right.usage.completion_tokens)
    again = client.messages.create(model=NAME, max_tokens=12, messages=MESSAGES, system="Be brief", extra_body=GREEDY)
    assert (again.usage.input_tokens, again.usage.cache_read_input_tokens) == (1, right.usage.prompt_tokens - 1)


def test_the_stream_makes_the_same_message(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 20, "messages": MESSAGES, "extra_body": GREEDY}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.text for block in whole.content if block.type == "text"] == [text]
    assert [block.text for block in final.content if block.type == "text"] == [text]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_the_streams_first_counts_are_its_last(running: Running) -> None:
    """Also where a part of the prompt was in the cache, which is known when it has been looked up."""
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 5, "messages": MESSAGES, "temperature": 0}
    for _ in range(2):
        lines = running.post("/v1/messages", **asked, stream=True).text.splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        first, last = events[0]["message"]["usage"], events[-2]["usage"]
        assert (events[0]["type"], events[-2]["type"]) == ("message_start", "message_delta")
        assert {**last, "output_tokens": 0} == first
    assert last["input_tokens"] == 1
    assert last["cache_read_input_tokens"] > 1


def test_a_stop_sequence_is_named(client: anthropic.Anthropic, llm: LLM) -> None:
    text = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=12)).text
    answer = client.messages.create(model=NAME, max_tokens=12, messages=MESSAGES, extra_body=GREEDY, stop_sequences=[text[3]])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", text[3])


def test_calls_are_blocks_streamed_and_whole(client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model writes is put in its mouth here; real models write calls in tests/test_real_model.py."""
    calls = "".join(f'\u273fFUNCTION\u273f: weather\n\u273fARGS\u273f: {{"place": "{place}"}}\n' for place in ("Rome", "Oslo"))
    said = f"Let me see.\n{calls}"  # as Qwen2 writes them, whose style a model without a template has
    read = Asked.read

    def speaking(self: Asked, chunk: Any) -> Any:
        from dataclasses import replace

        text = said if chunk.output is not None else ""
        output = None if chunk.output is None else replace(chunk.output, finish_reason="stop", text=said)
        return read(self, replace(chunk, text=text, output=output, finish_reason=None if output is None else "stop"))

    monkeypatch.setattr(Asked, "read", speaking)
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 5, "messages": MESSAGES, "tools": TOOLS}
    whole = client.messages.create(**asked)
    assert [block.type for block in whole.content] == ["text", "tool_use", "tool_use"]
    assert [block.input for block in whole.content if block.type == "tool_use"] == [{"place": "Rome"}, {"place": "Oslo"}]
    assert whole.stop_reason == "tool_use"
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use", "tool_use"]
    assert [block.input for block in final.content if block.type == "tool_use"] == [{"place": "Rome"}, {"place": "Oslo"}]
    one = client.messages.create(**asked, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in one.content] == ["text", "tool_use"]


def test_results_of_tools_reach_the_prompt(client: anthropic.Anthropic, llm: LLM) -> None:
    told: list[Any] = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {"place": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    ours = conversation(Prompt(model=NAME, messages=told))
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
    assert ours == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        {"role": "user", "content": "Well?"},
    ]
    counted = client.messages.count_tokens(model=NAME, messages=told, tools=TOOLS).input_tokens
    function = {"name": "weather", "description": "Of a place", "parameters": TOOLS[0]["input_schema"]}
    assert counted == len(llm.template.render(ours, tools=[{"type": "function", "function": function}], add_generation_prompt=True).ids)


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"foo": 1}, 400, "invalid_request_error", "unknown field foo"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens 0: must be a whole number of at least 1"),
        ({"thinking": {"type": "enabled", "depth": 1}}, 400, "invalid_request_error", "thinking.depth"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400, "invalid_request_error", "a tool of type 'web_search_"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "messages.0.content: images are not offered: these models read text only",
        ),
        ({"model": "claude"}, 404, "not_found_error", "model 'claude' is not here"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "invalid_request_error", "the window is 1,024"),
    ],
)
def test_refusals_have_anthropics_shape(running: Running, body: dict[str, Any], status: int, kind: str, message: str) -> None:
    answer = running.client.post("/v1/messages", json={"model": NAME, "max_tokens": 5, "messages": MESSAGES, **body})
    assert answer.status_code == status
    error = answer.json()
    assert (error["type"], error["error"]["type"]) == ("error", kind)
    assert message in error["error"]["message"]
