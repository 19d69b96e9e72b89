"""LlamaIndex: its OpenAI-like and Ollama classes, and an index over documents that asks both."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import CALL, COUNT, NUMBERS, QUESTION, TEXTS, WEATHER, WRITE_PERSON, Person, check_vectors
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike

KINDS = ["llama-index-llms-openai-like", "llama-index-llms-ollama"]


def get_weather(city: str) -> str:
    """The weather in a city now."""
    return f"{city}: {WEATHER}"


@pytest.fixture(params=KINDS)
def llm(request: pytest.FixtureRequest, url: str, model: str) -> Any:
    if request.param == "llama-index-llms-ollama":
        return Ollama(base_url=url, model=model, temperature=0, context_window=4096, request_timeout=120)
    more: dict[str, Any] = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 4096, "max_tokens": 60}
    return OpenAILike(api_base=f"{url}/v1", api_key="none", model=model, temperature=0, **more)


def test_chat(llm: Any) -> None:
    assert (
        "Paris"
        in llm.chat([ChatMessage(role="system", content="You are brief."), ChatMessage(role="user", content=QUESTION)]).message.content
    )
    assert "Paris" in llm.complete(QUESTION).text


def test_stream(llm: Any) -> None:
    pieces = list(llm.stream_chat([ChatMessage(role="user", content=COUNT)]))
    assert "".join(piece.delta or "" for piece in pieces).strip() == NUMBERS
    assert len(pieces) > 5


def test_tools(llm: Any) -> None:
    answer = llm.chat_with_tools([FunctionTool.from_defaults(get_weather)], user_msg=CALL)
    calls = llm.get_tool_calls_from_response(answer)
    assert [(call.tool_name, call.tool_kwargs) for call in calls] == [("get_weather", {"city": "Paris"})]


def test_structured_output(llm: Any) -> None:
    if isinstance(llm, OpenAILike):
        llm.should_use_structured_outputs = True  # response_format; else it asks through a tool
    answer = llm.as_structured_llm(Person).complete(WRITE_PERSON)
    assert answer.raw == Person(name="Anna", age=31)


def test_structured_output_through_a_required_tool(url: str, model: str) -> None:
    more: dict[str, Any] = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 4096, "max_tokens": 60}
    llm = OpenAILike(api_base=f"{url}/v1", api_key="none", model=model, temperature=0, **more)
    assert llm.as_structured_llm(Person).complete(WRITE_PERSON).raw == Person(name="Anna", age=31)


@pytest.mark.parametrize("kind", ["llama-index-embeddings-openai-like", "llama-index-embeddings-ollama"])
def test_embeddings(kind: str, url: str, model: str) -> None:
    if kind == "llama-index-embeddings-ollama":
        embed: Any = OllamaEmbedding(model_name=model, base_url=url)
    else:
        embed = OpenAILikeEmbedding(model_name=model, api_base=f"{url}/v1", api_key="none")
    check_vectors(embed.get_text_embedding_batch(TEXTS))


def test_an_index_over_documents(llm: Any, url: str, model: str) -> None:
    documents = [
        Document(text="The library of Alder opens at nine in the morning."),
        Document(text="Bread is made of flour, water and salt."),
    ]
    index = VectorStoreIndex.from_documents(documents, embed_model=OllamaEmbedding(model_name=model, base_url=url))
    assert "nine" in str(index.as_query_engine(llm=llm).query("When does the library of Alder open?"))
