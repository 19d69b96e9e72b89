"""OpenAI's /v1/responses through its own openai_client."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import openai
import pytest

from qwen2 import LLM, SamplingParams
from qwen2.engine.asked import Asked
from qwen2.server.responses import Ask
from tests.server.conftest import NAME, Running

TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "description": "Of a place", "parameters": {"type": "object", "properties": {}}}
]


def test_the_answer_is_the_engines(openai_client: openai.OpenAI, llm: LLM) -> None:
    answer = openai_client.responses.create(model=NAME, input="Hello", instructions="Be brief", temperature=0, max_output_tokens=12)
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
    right = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12))
    assert answer.output_text == right.text
    assert answer.status == {"length": "incomplete", "stop": "completed"}[right.finish_reason]
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (right.usage.prompt_tokens, right.usage.completion_tokens)
    assert (answer.temperature, answer.top_p) == (0, right.params.top_p)


def test_what_was_not_said_is_reported_as_it_was_used(openai_client: openai.OpenAI, llm: LLM) -> None:
    answer = openai_client.responses.create(
        model=NAME, input="Hello", max_output_tokens=1, top_logprobs=0, text={"verbosity": "medium", "format": {"type": "text"}}
    )
    used = SamplingParams().resolve(llm.generation)
    assert (answer.temperature, answer.top_p) == (used.temperature, used.top_p)


def test_the_stream_makes_the_same(openai_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "input": "Hello", "temperature": 0, "max_output_tokens": 12}
    whole = openai_client.responses.create(**asked)
    events = list(openai_client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert last.response.output_text == whole.output_text
    kinds = [event.type for event in events if not event.type.endswith(".delta")]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", f"response.{whole.status}",
    ]  # fmt: skip


def test_calls_are_items(openai_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'Let me see.\n\u273fFUNCTION\u273f: weather\n\u273fARGS\u273f: {"place": "Rome"}\n'
    read = Asked.read

    def speaking(self: Asked, chunk: Any) -> Any:
        output = None if chunk.output is None else replace(chunk.output, finish_reason="stop", text=said)
        return read(
            self, replace(chunk, text="" if output is None else said, output=output, finish_reason=None if output is None else "stop")
        )

    monkeypatch.setattr(Asked, "read", speaking)
    asked: dict[str, Any] = {"model": NAME, "input": "Weather?", "max_output_tokens": 5, "tools": TOOLS}
    whole = openai_client.responses.create(**asked)
    assert [item.type for item in whole.output] == ["message", "function_call"]
    assert whole.output[1].arguments == '{"place": "Rome"}'
    events = list(openai_client.responses.create(**asked, stream=True))
    assert [item.type for item in events[-1].response.output] == ["message", "function_call"]
    assert [event.delta for event in events if event.type == "response.function_call_arguments.delta"] == ['{"place": "Rome"}']


def test_calls_and_results_reach_the_prompt() -> None:
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "weather", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "a", "output": "sunny"},
        {"type": "function_call_output", "call_id": "b", "output": "rain"},
    ]
    messages = Ask(model=NAME, input=items).messages()
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool"]
    assert [call["function"]["arguments"] for call in messages[1]["tool_calls"]] == ["{}", '{"x": 1}']
    assert messages[3] == {"role": "tool", "tool_call_id": "b", "content": "rain"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"previous_response_id": "resp_1"}, "unknown field previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools: a tool of type 'web_search' is not offered: there is function"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input: an item of type 'item_reference' is not offered"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]}, "images are not offered"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": "x" * 3000}, "the window is 1,024"),
    ],
)
def test_refusals(running: Running, body: dict[str, Any], message: str) -> None:
    answer = running.client.post("/v1/responses", json={"model": NAME, "input": "a", **body})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_an_answer_that_is_cut_off_has_an_incomplete_message(openai_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "input": "Hello", "temperature": 0, "max_output_tokens": 3, "extra_body": {"ignore_eos": True}}
    whole = openai_client.responses.create(**asked)
    assert (whole.status, [item.status for item in whole.output]) == ("incomplete", ["incomplete"])
    events = list(openai_client.responses.create(**asked, stream=True))
    assert [item.status for item in events[-1].response.output] == ["incomplete"]
    assert [event.item.status for event in events if event.type == "response.output_item.done"] == ["incomplete"]
    ended = openai_client.responses.create(**asked | {"max_output_tokens": 400, "extra_body": {"stop": whole.output_text[0]}})
    assert (ended.status, [item.status for item in ended.output]) == ("completed", ["completed"])


def test_fields_that_its_siblings_have_mean_the_same(running: Running, llm: LLM) -> None:
    fields = {"seed": 5, "stop": ["q"], "min_p": 0.05, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    fields |= {"logit_bias": {"70": 2.0}, "temperature": 0.9, "top_k": -1, "max_tool_calls": 3}
    text = running.post("/v1/responses", model=NAME, input="Hello", max_output_tokens=30, **fields).json()["output"][0]["content"][0][
        "text"
    ]
    params = {name: value for name, value in fields.items() if name != "max_tool_calls"} | {"top_k": 0, "logit_bias": {70: 2.0}}
    right = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=30, **params)).text  # type: ignore[arg-type]
    assert text == right
    for wrong, word in (({"stop": ["x"] * 17}, "stop"), ({"repeat_penalty": 1.1}, "differ"), ({"min_p": 2}, "min_p")):
        answer = running.post("/v1/responses", model=NAME, input="Hello", **(fields | wrong))
        assert (answer.status_code, word in answer.json()["error"]["message"]) == (400, True)


def test_a_stream_that_fails_says_so_in_numbered_events(
    running: Running, openai_client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Asked, chunk: Any) -> Any:
        raise FloatingPointError("its logits are not numbers")

    monkeypatch.setattr(Asked, "read", broken)
    events = list(openai_client.responses.create(model=NAME, input="Hello", max_output_tokens=4, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events] == ["response.created", "response.in_progress", "error", "response.failed"]
    error, failed = events[-2:]
    assert error.message == failed.response.error.message == "the model failed: its logits are not numbers"
    assert (failed.response.status, failed.response.error.code, failed.response.output) == ("failed", "server_error", [])
    running.server.models.loaded[NAME].llm.engine.settle()
