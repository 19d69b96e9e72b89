"""LangChain: langchain-openai (chat completions and responses), langchain-ollama, langchain-anthropic."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import CALL, COUNT, NUMBERS, QUESTION, TELL, TEXTS, WEATHER, WRITE_PERSON, Person, check_vectors
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings


@tool
def get_weather(city: str) -> str:
    """The weather in a city now."""
    return f"{city}: {WEATHER}"


@pytest.fixture(params=["langchain-openai", "langchain-openai responses", "langchain-ollama", "langchain-anthropic"])
def chat(request: pytest.FixtureRequest, url: str, model: str) -> Any:
    openai: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": model, "temperature": 0, "max_tokens": 60}
    return {
        "langchain-openai": lambda: ChatOpenAI(**openai, stream_usage=True),
        "langchain-openai responses": lambda: ChatOpenAI(**openai, use_responses_api=True),
        "langchain-ollama": lambda: ChatOllama(base_url=url, model=model, temperature=0, num_predict=60),
        "langchain-anthropic": lambda: ChatAnthropic(base_url=url, api_key="none", model=model, temperature=0, max_tokens=60),
    }[request.param]()


def test_chat(chat: Any) -> None:
    answer = chat.invoke([SystemMessage("You are brief."), HumanMessage(QUESTION)])
    assert "Paris" in answer.text
    assert answer.usage_metadata["input_tokens"] > 20
    history = [HumanMessage("My name is Anna."), AIMessage("Hello Anna!"), HumanMessage("What is my name?")]
    assert "Anna" in chat.invoke(history).text


def test_stream(chat: Any) -> None:
    pieces = list(chat.stream(COUNT))
    assert "".join(piece.text for piece in pieces).strip() == NUMBERS
    assert sum(bool(piece.text) for piece in pieces) > 5
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    assert whole.usage_metadata["output_tokens"] > 10


async def test_many_at_once(chat: Any) -> None:
    answers = await chat.abatch([QUESTION, COUNT, QUESTION])
    assert answers[0].text == answers[2].text
    assert "Paris" in answers[0].text
    assert answers[1].text.strip() == NUMBERS


def test_tools(chat: Any) -> None:
    bound = chat.bind_tools([get_weather])
    answer = bound.invoke(CALL)
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("get_weather", {"city": "Paris"})]
    result = get_weather.invoke(answer.tool_calls[0])
    assert isinstance(result, ToolMessage)
    said = chat.invoke([HumanMessage("What is the weather in Paris?"), answer, result, HumanMessage(TELL)]).text
    assert "17" in said


def test_tools_streamed(chat: Any) -> None:
    pieces = list(chat.bind_tools([get_weather]).stream(CALL))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("get_weather", {"city": "Paris"})]


def test_structured_output(chat: Any) -> None:
    assert chat.with_structured_output(Person, method="json_schema").invoke(WRITE_PERSON) == Person(name="Anna", age=31)


def test_structured_output_through_a_named_tool(chat: Any) -> None:
    if isinstance(chat, ChatOllama):
        pytest.skip("Ollama's interface has no tool_choice")
    assert chat.with_structured_output(Person, method="function_calling").invoke(WRITE_PERSON) == Person(name="Anna", age=31)


def test_completion(url: str, model: str) -> None:
    prompt = "1 2 3 4 5 6"
    completion = OpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=8)
    assert completion.invoke(prompt).startswith(" 7 8")
    assert "Paris" in OllamaLLM(base_url=url, model=model, temperature=0, num_predict=8).invoke(QUESTION)


def test_embeddings(url: str, model: str) -> None:
    openai = OpenAIEmbeddings(base_url=f"{url}/v1", api_key="none", model=model, check_embedding_ctx_length=False)
    ollama = OllamaEmbeddings(base_url=url, model=model)
    vectors = openai.embed_documents(TEXTS)
    check_vectors(vectors)
    check_vectors(ollama.embed_documents(TEXTS))
    assert max(abs(a - b) for a, b in zip(vectors[0], ollama.embed_query(TEXTS[0]), strict=True)) < 1e-6
