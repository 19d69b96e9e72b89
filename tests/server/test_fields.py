"""Fields that clients send beside the question: unset ones as null, other servers' names, and what cannot change these models' answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qwen2 import LLM, SamplingParams
from qwen2.engine.asked import Asked
from qwen2.server.anthropic import Prompt, conversation
from qwen2.server.ollama import fill_in
from qwen2.server.ollama_models import FIM
from qwen2.server.responses import Ask
from tests.server.conftest import NAME, Running

MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/embeddings": {"input": "a"},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 2},
    "/api/chat": {"messages": MESSAGES, "stream": False, "options": {"num_predict": 2}},
    "/api/generate": {"prompt": "a", "stream": False, "options": {"num_predict": 2}},
    "/api/embed": {"input": "a"},
}


@pytest.mark.parametrize("path", BODIES)
def test_a_field_that_is_null_says_nothing(running: Running, path: str) -> None:
    nulls = dict.fromkeys(
        ("reasoning_effort", "audio", "function_call", "encoding_format", "stream_options", "stop", "truncate", "images", "of_tomorrow")
    )
    body = {"model": NAME, **nulls, **BODIES[path]}
    if "options" in body:
        body["options"] = {"seed": None, "nothing": None, **body["options"]}
    if "messages" in body:
        kinds = {"text": "Hello", "type": "text", "cache_control": None, "citations": None}
        body["messages"] = [{"role": "user", "content": [kinds] if path == "/v1/messages" else "Hello", "name": None}]
    answer = running.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    refused = running.client.post(path, json={**body, "of_tomorrow": 1})
    assert (refused.status_code, "of_tomorrow" in refused.text) == (400, True)


def test_null_is_the_default(running: Running) -> None:
    lines = running.post("/api/chat", model=NAME, messages=MESSAGES, stream=None, options=None, think=None, format=None, tools=None)
    assert lines.headers["content-type"].startswith("application/x-ndjson")
    assert "Field required" in running.post("/v1/embeddings", model=NAME, input=None).json()["error"]["message"]


# --- coding agents


def test_what_agents_say_of_thinking_changes_nothing(running: Running) -> None:
    """As Claude Code sends it."""
    plain = {"model": NAME, "max_tokens": 8, "messages": MESSAGES, "temperature": 0}
    agents = {
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
        "betas": ["interleaved-thinking-2025-05-14"],
        "cache_control": {"type": "ephemeral"},
        "metadata": {"user_id": "a"},
    }
    text = running.post("/v1/messages", **plain).json()["content"]
    assert running.post("/v1/messages", **plain, **agents).json()["content"] == text
    for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}):
        assert running.post("/v1/messages", **plain, thinking=thinking).json()["content"] == text
    asked = {"model": NAME, "messages": MESSAGES, **agents}
    assert running.post("/v1/messages/count_tokens", **asked).json()["input_tokens"] > 0


def test_thoughts_of_others_are_left_out() -> None:
    kept = {"type": "text", "text": "Sunny.", "cache_control": {"type": "ephemeral"}}
    thoughts = [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "redacted_thinking", "data": "y"}]
    told: list[Any] = [*MESSAGES, {"role": "assistant", "content": [*thoughts, kept]}, *MESSAGES]
    assert conversation(Prompt(model=NAME, messages=told)) == [*MESSAGES, {"role": "assistant", "content": "Sunny."}, *MESSAGES]


def test_reasoning_of_responses_changes_nothing(running: Running) -> None:
    """As Codex sends it."""
    plain = {"model": NAME, "input": "Hello", "max_output_tokens": 8, "temperature": 0}
    agents = {"reasoning": {"effort": "high", "summary": "auto"}, "include": ["reasoning.encrypted_content"], "store": False}
    text = running.post("/v1/responses", **plain).json()["output"][0]["content"]
    assert running.post("/v1/responses", **plain, **agents).json()["output"][0]["content"] == text
    items: list[Any] = [
        {"role": "user", "content": "Hello"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
    ]
    assert [one["role"] for one in Ask(model=NAME, input=items).messages()] == ["user", "assistant"]


# --- as other servers have them


def test_minus_one_is_off_and_no_limit(running: Running, llm: LLM) -> None:
    right = llm.chat(MESSAGES, SamplingParams(temperature=1.0, seed=3, top_k=0, max_tokens=None, stop=["q"])).text
    answer = running.chat(temperature=1.0, seed=3, top_k=-1, max_tokens=-1, stop="q", cache_prompt=True).json()
    assert answer["choices"][0]["message"]["content"] == right
    params: dict[str, Any] = {"temperature": 0, "stop": ["q"]}
    longer = running.post("/v1/completions", model=NAME, prompt="Hello", max_tokens=-1, **params).json()["choices"][0]["text"]
    assert longer == llm.generate(["Hello"], SamplingParams(**params))[0].text
    assert running.chat(top_k=-2).status_code == running.chat(max_tokens=-2).status_code == 400
    assert running.chat(cache_prompt=False).status_code == 400


NEUTRAL = {  # what vLLM has, as clients that know its fields send it: what is so in any case
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), True),
    **dict.fromkeys(("include_stop_str_in_output", "use_beam_search", "echo"), False),
    **{"length_penalty": 1.0, "typical_p": 1.0, "best_of": 1},
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_what_is_so_in_any_case_may_be_said(running: Running, path: str) -> None:
    body = {"model": NAME, **BODIES[path]}
    assert running.post(path, **body, **NEUTRAL).status_code == 200
    others = {"length_penalty": 1.2, "typical_p": 0.9, "best_of": 2, "skip_special_tokens": False, "include_stop_str_in_output": True}
    for name, value in (others if path == "/v1/completions" else others | {"echo": True}).items():
        answer = running.post(path, **body, **{name: value})
        word = {True: "true", False: "false"}[not value] if isinstance(value, bool) else "1"
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, f"{name}: only {word} is offered")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_tool_choice_that_is_not_offered_is_told_in_our_own_words(running: Running, path: str) -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}] if path == "/v1/chat/completions" else [{"type": "function", **function}]
    few = {"type": "allowed_tools", "mode": "auto", "tools": tools, "allowed_tools": {"mode": "auto", "tools": tools}}
    for choice, told in (
        (few, "tool_choice: allowed_tools is not offered: send only those tools, and the mode, auto or required, as tool_choice"),
        ({"type": "custom"}, "tool_choice: type 'custom' is not offered: there are auto, none, required, and a function by its name"),
    ):
        answer = running.post(path, model=NAME, tools=tools, tool_choice=choice, **BODIES[path])
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, told)


def test_a_penalty_under_either_name(running: Running) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "logit_bias": {"511": -100, "509": -100}}
    texts = [running.chat(**asked, **one).json()["choices"][0]["message"]["content"] for one in (
        {}, {"repetition_penalty": 5.0}, {"repeat_penalty": 5.0}, {"repetition_penalty": 5.0, "repeat_penalty": 5.0},
    )]  # fmt: skip
    assert texts[0] != texts[1] == texts[2] == texts[3]
    both = running.chat(repetition_penalty=1.0, repeat_penalty=1.1)
    assert (both.status_code, "differ" in both.json()["error"]["message"]) == (400, True)


def test_a_priority_reaches_the_engine(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, read = set(), Asked.read

    def watched(self: Asked, chunk: Any) -> Any:
        seen.add(self.request.priority)
        return read(self, chunk)

    refused = running.chat(max_tokens=1, priority=-7)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    assert "--priorities" in refused.json()["error"]["message"]
    assert running.chat(max_tokens=1, priority=0).status_code == 200
    monkeypatch.setattr(Asked, "read", watched)
    monkeypatch.setattr(running.server, "settings", replace(running.server.settings, priorities=True))
    assert running.chat(max_tokens=1, priority=-7).status_code == 200
    assert running.post("/v1/completions", model=NAME, prompt=["a", "b"], max_tokens=1, priority=9).status_code == 200
    assert seen == {-7, 9}
    assert running.chat(max_tokens=1, priority=1 << 40).status_code == 400


def test_completions_fill_in_the_middle(running: Running, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": "def f(x):", "suffix": "return x", "temperature": 0, "max_tokens": 8}
    refused = running.post("/v1/completions", **asked)
    assert (refused.status_code, "no tokens for filling in the middle" in refused.text) == (400, True)
    served = running.server.models.loaded[NAME].llm
    for place, name in enumerate(FIM):  # any three tokens do
        monkeypatch.setitem(served.tokenizer.control, name, 300 + place)
    ids = fill_in(served, asked["prompt"], asked["suffix"])
    assert ids == [300, *llm.tokenizer.encode("def f(x):"), 301, *llm.tokenizer.encode("return x"), 302]
    text = running.post("/v1/completions", **asked).json()["choices"][0]["text"]
    assert text == llm.generate([ids], SamplingParams(temperature=0, max_tokens=8))[0].text
    for other in ({"prompt": [1, 2]}, {"echo": True}, {"prompt_logprobs": 1}):
        assert running.post("/v1/completions", **{**asked, **other}).status_code == 400, other


def test_shorter_vectors(running: Running, llm: LLM) -> None:
    whole = llm.embed(["a rose", "b"]).numpy()
    data = running.post("/v1/embeddings", model=NAME, input=["a rose", "b"], dimensions=16).json()["data"]
    cut = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True)
    assert np.allclose([one["embedding"] for one in data], cut, atol=1e-6)
    assert np.allclose(running.post("/api/embed", model=NAME, input=["a rose", "b"], dimensions=16).json()["embeddings"], cut, atol=1e-6)
    for path in ("/v1/embeddings", "/api/embed"):
        for dimensions in (0, whole.shape[1] + 1):
            answer = running.post(path, model=NAME, input="a", dimensions=dimensions)
            assert (answer.status_code, "dimensions" in answer.text) == (400, True)


# --- messages


def test_refusals_in_plain_words(running: Running) -> None:
    empty = running.client.post("/v1/chat/completions")
    assert (empty.status_code, empty.json()["error"]["message"]) == (400, "the body is empty: send a JSON object")
    listed = running.client.post("/v1/chat/completions", json=[1])
    assert (listed.status_code, listed.json()["error"]["message"].startswith("the body: ")) == (400, True)
    wrong = running.client.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
    for path, body in BODIES.items():
        answer = running.client.post(path, json={"model": "x" * 5000, **body})
        assert (answer.status_code, len(answer.text) < 400) == (404, True), path
    for method, path in (("POST", "show"), ("POST", "pull"), ("DELETE", "delete")):
        for name in ("x" * 5000, "a/" + "x" * 5000):
            answer = running.client.request(method, f"/api/{path}", json={"model": name})
            assert "x" * 20 in answer.text
            assert all(len(line) < 400 for line in answer.text.splitlines()), path


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v1/score", "/v1/load_lora_adapter", "/v1/images/generations", "/api/push"])
def test_what_other_servers_offer_and_this_one_does_not_is_a_404_in_words(running: Running, path: str) -> None:
    answer = running.post(path, model=NAME, query="a", documents=["b"])
    error = answer.json()["error"]
    assert (answer.status_code, error if path.startswith("/api/") else error["message"]) == (404, f"POST {path}: Not Found")


@pytest.mark.parametrize("field", ["lora_request", "adapter", "lora_name"])
def test_an_adapter_for_one_request_is_refused_by_name(running: Running, field: str) -> None:
    for path in ("/v1/chat/completions", "/api/chat", "/v1/messages"):
        answer = running.post(path, model=NAME, messages=[{"role": "user", "content": "a"}], max_tokens=1, **{field: "mine"})
        assert answer.status_code == 400
        assert "unknown field " in answer.text
        assert field in answer.text
    assert running.post("/v1/completions", model=f"{NAME}-mine", prompt="a").status_code == 404


@pytest.mark.parametrize("field", ["temperature", "top_k", "min_p", "presence_penalty", "seed", "max_tokens", "repetition_penalty"])
def test_what_the_engine_refuses_is_named(running: Running, field: str) -> None:
    error = running.chat(**{field: -(2**70)}).json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)


def test_ollamas_window_of_penalties(running: Running, llm: LLM) -> None:
    def text(**options: Any) -> str:
        asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "stream": False}
        answer = running.post("/api/chat", **asked, options={"temperature": 0, "num_predict": 24, "repeat_penalty": 5.0, **options})
        found: str = answer.json()["message"]["content"]
        return found

    params = SamplingParams(temperature=0, max_tokens=24, repetition_penalty=5.0)
    rights = [llm.chat(MESSAGES, replace(params, penalty_window=window)).text for window in (-1, 0, 4)]
    assert [text(repeat_last_n=window) for window in (-1, 0, 4)] == rights
    assert len(set(rights)) == 3
    assert text() == rights[0]
    assert llm.chat(MESSAGES, replace(params, repetition_penalty=1.0)).text == rights[1]
