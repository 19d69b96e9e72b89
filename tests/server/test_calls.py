"""Forced and strict calls over HTTP, by each dialect's own client: whole and streamed alike, cut off, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import jsonschema
import ollama
import openai
import pytest

from tests.engine.schemas import PLACES
from tests.server.conftest import NAME, Running

SUMS = {
    "type": "object",
    "properties": {"of": {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 3}},
    "required": ["of"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {"weather": PLACES, "sum": SUMS}
MESSAGES: list[Any] = [{"role": "user", "content": "Weather?"}]
WARM: dict[str, Any] = {"temperature": 1.0, "seed": 5}
FUNCTIONS: list[Any] = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
FLAT: list[Any] = [{"type": "function", "name": name, "parameters": schema, "strict": None} for name, schema in SCHEMAS.items()]
BLOCKS: list[Any] = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]


def valid(name: str, arguments: Any) -> None:
    jsonschema.validate(json.loads(arguments) if isinstance(arguments, str) else arguments, SCHEMAS[name])


# --- OpenAI's chat


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "sum"}}], ids=["required", "named"])
def test_chat_calls_whole_and_streamed(openai_client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "tools": FUNCTIONS, "tool_choice": choice, "max_tokens": 400, **WARM}
    asked |= {"parallel_tool_calls": False, "logprobs": True, "n": 2}
    whole = openai_client.chat.completions.create(**asked)
    for one in whole.choices:
        assert one.finish_reason == "tool_calls"
        assert one.message.content is None
        assert one.message.tool_calls is not None
        (call,) = one.message.tool_calls
        assert call.type == "function"
        valid(call.function.name, call.function.arguments)
        assert choice == "required" or call.function.name == "sum"
    with openai_client.chat.completions.stream(**asked) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion()
    assert len(pieces) > 10, "the arguments come as they are written"
    for one, other in zip(whole.choices, final.choices, strict=True):
        assert one.message.tool_calls is not None
        assert other.message.tool_calls is not None
        assert [call.function.name for call in one.message.tool_calls] == [call.function.name for call in other.message.tool_calls]
        assert [call.function.arguments for call in one.message.tool_calls] == [
            call.function.arguments for call in other.message.tool_calls
        ]
        assert one.finish_reason == other.finish_reason
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert one.logprobs.content == other.logprobs.content


def test_chat_several_calls_and_strict_ones(openai_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "tools": FUNCTIONS, "max_tokens": 600, **WARM}
    several = openai_client.chat.completions.create(**asked, tool_choice="required").choices[0]
    assert several.message.tool_calls
    for call in several.message.tool_calls[:-1] if several.finish_reason == "length" else several.message.tool_calls:
        assert call.type == "function"
        valid(call.function.name, call.function.arguments)
    assert len({call.id for call in several.message.tool_calls}) == len(several.message.tool_calls)
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in FUNCTIONS]
    free = openai_client.chat.completions.create(**asked | {"tools": strict, "max_tokens": 30}).choices[0]
    assert free.finish_reason in ("length", "stop")
    assert free.message.content


def test_chat_a_call_cut_off_has_what_was_written(openai_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "tools": FUNCTIONS, **WARM}
    asked["tool_choice"] = {"type": "function", "function": {"name": "weather"}}
    whole = openai_client.chat.completions.create(**asked, max_tokens=400)
    assert whole.choices[0].message.tool_calls
    call = whole.choices[0].message.tool_calls[0]
    assert call.type == "function"
    for most in range(1, whole.usage.completion_tokens if whole.usage else 0, 4):
        one = openai_client.chat.completions.create(**asked, max_tokens=most).choices[0]
        assert one.finish_reason == "length"
        text, arguments = "", ""
        for chunk in openai_client.chat.completions.create(**asked, max_tokens=most, stream=True):
            text += chunk.choices[0].delta.content or ""
            for piece in chunk.choices[0].delta.tool_calls or ():
                arguments += (piece.function.arguments if piece.function else "") or ""
        got = one.message.tool_calls[0] if one.message.tool_calls else None
        assert (one.message.content or "") == text == "", "a call cut off before its name is no content"
        assert arguments == (got.function.arguments if got is not None and got.type == "function" else "")
        assert call.function.arguments.startswith(arguments)


# --- OpenAI's responses


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}], ids=["required", "named"])
def test_responses_call_whole_and_streamed(openai_client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"model": NAME, "input": "Weather?", "tools": FLAT, "tool_choice": choice, "parallel_tool_calls": False}
    asked |= {"temperature": 0, "max_output_tokens": 400}
    whole = openai_client.responses.create(**asked)
    assert whole.status == "completed"
    assert whole.tool_choice == choice or whole.tool_choice.model_dump() == choice  # type: ignore[union-attr]
    (item,) = whole.output
    assert item.type == "function_call"
    assert item.status == "completed"
    valid(item.name, item.arguments)
    events = list(openai_client.responses.create(**asked, stream=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 10
    assert "".join(deltas) == item.arguments
    (last,) = events[-1].response.output
    assert (last.type, last.name, last.arguments, last.status) == ("function_call", item.name, item.arguments, "completed")
    kinds = [event.type for event in events if not event.type.endswith(".delta")]
    assert kinds[2:5] == ["response.output_item.added", "response.function_call_arguments.done", "response.output_item.done"]
    used = whole.usage.output_tokens if whole.usage else 0
    short = openai_client.responses.create(**asked | {"max_output_tokens": used - 3})
    assert short.status == "incomplete"
    (cut,) = short.output
    assert (cut.type, cut.status) == ("function_call", "incomplete")
    assert item.arguments.startswith(cut.arguments)


# --- Anthropic's


@pytest.fixture
def claude(running: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "sum"}], ids=["any", "named"])
def test_anthropic_calls_whole_and_streamed(claude: anthropic.Anthropic, choice: Any) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "tools": BLOCKS, "max_tokens": 400, "extra_body": {"temperature": 0}}
    asked["tool_choice"] = choice | {"disable_parallel_tool_use": True}
    whole = claude.messages.create(**asked)
    assert whole.stop_reason == "tool_use"
    (block,) = whole.content
    assert block.type == "tool_use"
    valid(block.name, block.input)
    with claude.messages.stream(**asked) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert len(pieces) > 10
    (other,) = final.content
    assert other.type == "tool_use"
    assert (other.name, other.input, final.stop_reason) == (block.name, block.input, "tool_use")
    for most in range(1, whole.usage.output_tokens, 7):
        cut = claude.messages.create(**asked | {"max_tokens": most})
        assert cut.stop_reason == "max_tokens"
        if cut.content[0].type == "tool_use":
            assert cut.content[0].name == block.name
        with claude.messages.stream(**asked | {"max_tokens": most}) as stream:
            end = stream.get_final_message()
        assert (end.stop_reason, end.content[0].type) == ("max_tokens", cut.content[0].type)


def test_anthropic_strict_tools_leave_text_free(claude: anthropic.Anthropic) -> None:
    tools = [block | {"strict": True} for block in BLOCKS]
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_tokens": 20, "extra_body": {"temperature": 0}}
    strict = claude.messages.create(**asked, tools=tools)
    free = claude.messages.create(**asked, tools=BLOCKS)
    assert strict.usage.input_tokens + (strict.usage.cache_read_input_tokens or 0) == free.usage.input_tokens + (
        free.usage.cache_read_input_tokens or 0
    )
    assert strict.content[0].type == free.content[0].type == "text"


# --- Ollama's, which has no choice of tools


def test_ollama_takes_strict_tools(running: Running) -> None:
    client = ollama.Client(host=running.url)
    tools = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in FUNCTIONS]
    answer = client.chat(NAME, MESSAGES, options={"temperature": 0, "num_predict": 10}, tools=FUNCTIONS)
    assert answer.message.content
    held = running.post("/api/chat", model=NAME, messages=MESSAGES, tools=tools, stream=False, options={"num_predict": 10})
    assert held.status_code == 200
    bad = [{"type": "function", "function": {"name": "odd", "parameters": {"properties": {"a": {"type": "strange"}}}, "strict": True}}]
    refused = running.post("/api/chat", model=NAME, messages=MESSAGES, tools=bad, stream=False)
    assert refused.status_code == 400
    assert "tool 'odd'" in refused.json()["error"]


# --- refusals

ODD = {"name": "odd", "parameters": {"properties": {"a": {"type": "strange"}}}}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice asks for a call: give tools"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": FUNCTIONS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "the function 'f', which is not among the tools: weather, sum"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": [{"type": "function", "function": ODD}], "tool_choice": "required"}, "tool 'odd': its parameters: Invalid type: strange"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": [{"type": "function", "function": {**ODD, "strict": True}}]}, "tool 'odd': its parameters: Invalid type: strange"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": FUNCTIONS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "cannot be held to a form and to calls"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": FUNCTIONS, "tool_choice": "maybe"}, "tool_choice"),
        ("/v1/responses", {"input": "a", "tool_choice": "required"}, "tool_choice asks for a call: give tools"),
        ("/v1/responses", {"input": "a", "tools": FLAT, "tool_choice": {"type": "function", "name": "f"}}, "the function 'f', which is not among"),
        ("/v1/responses", {"input": "a", "tools": [{"type": "function", **ODD, "strict": True}]}, "tool 'odd'"),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 9, "tool_choice": {"type": "any"}}, "tool_choice asks for a call: give tools"),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 9, "tools": BLOCKS, "tool_choice": {"type": "tool", "name": "f"}}, "the function 'f', which is not among"),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 9, "tools": BLOCKS, "tool_choice": {"type": "tool"}}, "name"),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 9, "tools": [{"name": "odd", "input_schema": ODD["parameters"], "strict": True}]}, "tool 'odd'"),
    ],
)  # fmt: skip
def test_refusals(running: Running, path: str, body: dict[str, Any], message: str) -> None:
    answer = running.post(path, model=NAME, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]["message"]
    assert message in error
    assert "\n" not in error


# --- calls in plain JSON, as Qwen2.5-Coder writes them

PLAIN = '```json\n{\n  "name": "sum",\n  "arguments": {"of": [1, 2]}\n}\n```'


@pytest.mark.parametrize(
    ("text", "calls"), [(PLAIN, 1), (PLAIN.replace("sum", "total"), 0), (f"So:\n{PLAIN}", 0)], ids=["call", "name", "words"]
)
def test_plain_json_is_a_call_in_every_dialect_whole_and_streamed(
    running: Running, openai_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, text: str, calls: int
) -> None:
    running.chat(max_tokens=1)
    llm = running.server.models.loaded[NAME].llm
    end = next(iter(llm.engine.eos))

    def says() -> None:
        tokens = iter([*llm.tokenizer.encode(text), *[end] * 9])
        monkeypatch.setattr("qwen2.engine.engine.Sampled.token", lambda self, row, sampler: next(tokens))

    called = [("sum", {"of": [1, 2]})] * calls
    content = "" if calls else text
    chat = openai_client.chat.completions
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "tools": FUNCTIONS, "logprobs": True}
    says()
    whole = chat.create(**asked).choices[0]
    says()
    with chat.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    for one in (whole, streamed):
        found = [
            (call.function.name, json.loads(call.function.arguments)) for call in one.message.tool_calls or () if call.type == "function"
        ]
        assert (one.message.content or "", found, one.finish_reason) == (content, called, "tool_calls" if calls else "stop")
    assert whole.logprobs is not None
    assert streamed.logprobs is not None
    assert whole.logprobs.content == streamed.logprobs.content
    client = ollama.Client(host=running.url)
    says()
    message = client.chat(NAME, MESSAGES, tools=FUNCTIONS).message
    says()
    pieces = [piece.message for piece in client.chat(NAME, MESSAGES, tools=FUNCTIONS, stream=True)]
    for messages in ([message], pieces):
        assert "".join(one.content or "" for one in messages) == content
        assert [(call.function.name, call.function.arguments) for one in messages for call in one.tool_calls or ()] == called
    says()
    blocks = running.post("/v1/messages", model=NAME, messages=MESSAGES, tools=BLOCKS, max_tokens=200).json()
    assert [(one["name"], one["input"]) for one in blocks["content"] if one["type"] == "tool_use"] == called
    assert blocks["stop_reason"] == ("tool_use" if calls else "end_turn")
    says()
    items = openai_client.responses.create(model=NAME, input="Sum?", tools=FLAT).output
    assert [(one.name, json.loads(one.arguments)) for one in items if one.type == "function_call"] == called


# --- conversations as clients hold them


def test_a_call_that_was_cut_off_is_text_when_it_comes_back(running: Running) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "tools": FUNCTIONS, "tool_choice": "required", **WARM}
    (cut,) = running.post("/v1/chat/completions", **(asked | {"max_tokens": 40})).json()["choices"]
    assert cut["finish_reason"] == "length"
    (call,) = cut["message"]["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "no such place"}
    more = running.post("/v1/chat/completions", model=NAME, messages=[*MESSAGES, cut["message"], result], max_tokens=3).json()
    assert more["usage"]["completion_tokens"] == 3
    written = f'{{"name": "{call["function"]["name"]}", "arguments": {call["function"]["arguments"]}'
    said = {"role": "assistant", "content": written}
    same = running.post("/v1/chat/completions", model=NAME, messages=[*MESSAGES, said, result], max_tokens=3).json()
    assert same["usage"]["prompt_tokens"] == more["usage"]["prompt_tokens"]


def test_an_index_left_over_from_a_stream_says_nothing(running: Running) -> None:
    call = {"id": "call_1", "type": "function", "index": 0, "function": {"index": 0, "name": "sum", "arguments": '{"of": [1]}'}}
    said = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]}
    parts = [{"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}}]
    body = {"model": NAME, "messages": [*MESSAGES, said, {"role": "user", "content": parts}], "max_tokens": 2, "reasoning_effort": "low"}
    assert running.post("/v1/chat/completions", **body).json()["usage"]["completion_tokens"] == 2
    own = {"role": "assistant", "content": "", "tool_calls": [{"function": {"index": 0, "name": "sum", "arguments": {"of": [1]}}}]}
    asked = {"model": NAME, "messages": [*MESSAGES, own, {"role": "tool", "content": "1"}], "stream": False, "options": {"num_predict": 2}}
    answer = running.post("/api/chat", **asked).json()
    assert answer.get("eval_count") == 2, answer


def test_forced_calls_are_held_to_what_can_be_enforced(running: Running) -> None:
    schema = {**SUMS, "properties": {"of": {**SUMS["properties"]["of"], "uniqueItems": True}}, "dependentRequired": {}}
    tool = {"type": "function", "function": {"name": "sum", "parameters": schema}}
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "tools": [tool], "tool_choice": "required", "max_tokens": 400, **WARM}
    (choice,) = running.post("/v1/chat/completions", **(asked | {"parallel_tool_calls": False})).json()["choices"]
    valid("sum", choice["message"]["tool_calls"][0]["function"]["arguments"])
