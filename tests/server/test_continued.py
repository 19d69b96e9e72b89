"""An answer whose beginning is given goes on from there, in every dialect that has a way to say so."""

from __future__ import annotations

from typing import Any

import anthropic
import ollama
import openai
import pytest

from qwen2 import LLM, SamplingParams
from tests.server.conftest import NAME, Running

BEGUN: list[Any] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Once upon"}]
GREEDY = {"temperature": 0, "repetition_penalty": 1.0}


@pytest.fixture
def right(llm: LLM) -> str:
    """What follows the beginning, by ids."""
    ids = [*llm.template.render(BEGUN[:1]).ids, *llm.tokenizer.encode("Once upon")]
    (output,) = llm.generate([ids], SamplingParams(**GREEDY, max_tokens=12))
    return output.text


def test_openai_goes_on_where_it_is_told_to(openai_client: openai.OpenAI, right: str, llm: LLM) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": BEGUN, "max_tokens": 12, "temperature": 0}
    body = {"continue_final_message": True, "add_generation_prompt": False, "repetition_penalty": 1.0}
    answer = openai_client.chat.completions.create(**asked, extra_body=body)
    assert answer.choices[0].message.content == right
    plain = openai_client.chat.completions.create(**asked, extra_body={"repetition_penalty": 1.0})
    assert plain.choices[0].message.content == llm.chat(BEGUN, SamplingParams(**GREEDY, max_tokens=12)).text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": True}, "send one of them"),
        ({"messages": BEGUN, "add_generation_prompt": False}, "send one of them"),
        ({"messages": BEGUN[:1], "continue_final_message": True}, "goes on with an assistant's message, and the last is none"),
    ],
)
def test_what_contradicts_itself_is_refused(running: Running, body: dict[str, Any], message: str) -> None:
    answer = running.post("/v1/chat/completions", model=NAME, **body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_anthropic_and_ollama_always_go_on(running: Running, right: str) -> None:
    client = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
    answer = client.messages.create(model=NAME, max_tokens=12, messages=BEGUN, extra_body={"temperature": 0})
    assert [block.text for block in answer.content if block.type == "text"] == [right]
    counted = client.messages.count_tokens(model=NAME, messages=BEGUN)
    assert counted.input_tokens == answer.usage.input_tokens
    other = ollama.Client(running.url).chat(NAME, BEGUN, options={"temperature": 0, "num_predict": 12, "repeat_penalty": 1.0})
    assert other.message.content == right
