"""LiteLLM: its providers openai/, ollama/, ollama_chat/ and anthropic/."""

from __future__ import annotations

from typing import Any

import litellm
import pytest
from conftest import CALL, COUNT, FUNCTION, NUMBERS, QUESTION, TEXTS, WRITE_PERSON, Person, check_vectors


@pytest.fixture(params=["openai", "ollama", "ollama_chat", "anthropic"])
def asked(request: pytest.FixtureRequest, url: str, model: str) -> dict[str, Any]:
    base = {"openai": f"{url}/v1"}.get(request.param, url)
    return {"model": f"{request.param}/{model}", "api_base": base, "api_key": "none", "max_tokens": 60, "temperature": 0}


def test_chat(asked: dict[str, Any]) -> None:
    answer = litellm.completion(**asked, messages=[{"role": "system", "content": "You are brief."}, {"role": "user", "content": QUESTION}])
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 0


def test_stream(asked: dict[str, Any]) -> None:
    pieces = list(litellm.completion(**asked, messages=[{"role": "user", "content": COUNT}], stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces).strip() == NUMBERS
    assert len(pieces) > 5


def test_tools(asked: dict[str, Any]) -> None:
    if asked["model"].startswith("ollama/"):
        pytest.skip("litellm writes tools into the prompt of this provider; ollama_chat has them")
    answer = litellm.completion(**asked, messages=[{"role": "user", "content": CALL}], tools=[{"type": "function", "function": FUNCTION}])
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments.replace(" ", "")) == ("get_weather", '{"city":"Paris"}')


def test_structured_output(asked: dict[str, Any]) -> None:
    answer = litellm.completion(**asked, messages=[{"role": "user", "content": WRITE_PERSON}], response_format=Person)
    assert Person.model_validate_json(answer.choices[0].message.content) == Person(name="Anna", age=31)


def test_embeddings(asked: dict[str, Any]) -> None:
    if asked["model"].startswith(("ollama_chat/", "anthropic/")):
        pytest.skip("no embeddings in this provider of litellm")
    answer = litellm.embedding(model=asked["model"], api_base=asked["api_base"], api_key="none", input=TEXTS)
    check_vectors([one["embedding"] for one in answer.data])
