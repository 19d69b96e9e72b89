"""Frameworks of agents: Qwen-Agent, OpenAI's agents, pydantic-ai, smolagents; and the official Python clients beside them."""

from __future__ import annotations

import json
from typing import Any

import agents
import openai
import pydantic_ai
import pytest
from conftest import CALL, COUNT, FUNCTION, NUMBERS, QUESTION, WEATHER, WRITE_PERSON, Person
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from qwen_agent.agents import Assistant
from qwen_agent.tools.base import BaseTool
from smolagents import OpenAIServerModel
from smolagents import tool as smol_tool

agents.set_tracing_disabled(True)


# --- Qwen-Agent


class Weather(BaseTool):
    name = FUNCTION["name"]
    description = FUNCTION["description"]
    parameters = FUNCTION["parameters"]

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def call(self, params: str | dict[str, Any], **_: Any) -> str:
        self.asked.append(json.loads(params) if isinstance(params, str) else params)
        return WEATHER


@pytest.fixture(params=["Qwen-Agent's prompt", "the server's tools"])
def qwen_agent(request: pytest.FixtureRequest, url: str, model: str) -> dict[str, Any]:
    raw = request.param == "the server's tools"
    return {
        "model": model,
        "model_type": "oai",
        "model_server": f"{url}/v1",
        "api_key": "EMPTY",
        "generate_cfg": {"temperature": 0, "max_tokens": 80, "use_raw_api": raw},
    }


def test_qwen_agent_chat(qwen_agent: dict[str, Any]) -> None:
    *_, last = Assistant(llm=qwen_agent).run([{"role": "user", "content": QUESTION}])
    assert "Paris" in last[-1]["content"]


def test_qwen_agent_function(qwen_agent: dict[str, Any]) -> None:
    weather = Weather()
    *_, last = Assistant(llm=qwen_agent, function_list=[weather]).run([{"role": "user", "content": CALL}])
    assert weather.asked[0] == {"city": "Paris"}
    assert any(message["role"] == "function" and message["content"] == WEATHER for message in last)


# --- OpenAI's agents


@pytest.fixture(params=["chat completions", "responses"])
def agents_model(request: pytest.FixtureRequest, url: str, model: str) -> Any:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    kind = agents.OpenAIChatCompletionsModel if request.param == "chat completions" else agents.OpenAIResponsesModel
    return kind(model=model, openai_client=client)


SETTINGS = agents.ModelSettings(temperature=0, max_tokens=60)


async def test_openai_agents_chat_and_stream(agents_model: Any) -> None:
    agent = agents.Agent(name="a", instructions="You are brief.", model=agents_model, model_settings=SETTINGS)
    assert "Paris" in (await agents.Runner.run(agent, QUESTION)).final_output
    running = agents.Runner.run_streamed(agents.Agent(name="a", model=agents_model, model_settings=SETTINGS), COUNT)
    texts = [
        one.data.delta async for one in running.stream_events() if one.type == "raw_response_event" and one.data.type.endswith("text.delta")
    ]
    assert "".join(texts).strip() == running.final_output.strip() == NUMBERS


async def agents_call(agents_model: Any, strict: bool) -> list[Any]:
    asked: list[Any] = []

    @agents.function_tool(strict_mode=strict)
    def get_weather(city: str) -> str:
        """The weather in a city now."""
        asked.append(city)
        return WEATHER

    agent = agents.Agent(name="a", model=agents_model, model_settings=SETTINGS, tools=[get_weather], tool_use_behavior="stop_on_first_tool")
    assert (await agents.Runner.run(agent, CALL)).final_output == WEATHER
    return asked


async def test_openai_agents_tool(agents_model: Any) -> None:
    assert await agents_call(agents_model, strict=False) == ["Paris"]


async def test_openai_agents_strict_tool(agents_model: Any) -> None:
    assert await agents_call(agents_model, strict=True) == ["Paris"]


async def test_openai_agents_structured_output(agents_model: Any) -> None:
    agent = agents.Agent(name="a", model=agents_model, model_settings=SETTINGS, output_type=Person)
    assert (await agents.Runner.run(agent, WRITE_PERSON)).final_output == Person(name="Anna", age=31)


# --- pydantic-ai


@pytest.fixture(params=["chat completions", "responses"])
def pydantic_model(request: pytest.FixtureRequest, url: str, model: str) -> Any:
    kind = OpenAIChatModel if request.param == "chat completions" else OpenAIResponsesModel
    return kind(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))


PLAIN: Any = {"temperature": 0, "max_tokens": 60}


async def test_pydantic_ai_chat_and_stream(pydantic_model: Any) -> None:
    agent = pydantic_ai.Agent(pydantic_model, instructions="You are brief.", model_settings=PLAIN)
    assert "Paris" in (await agent.run(QUESTION)).output
    async with pydantic_ai.Agent(pydantic_model, model_settings=PLAIN).run_stream(COUNT) as running:
        pieces = [piece async for piece in running.stream_text(delta=True, debounce_by=None)]
    assert "".join(pieces).strip() == NUMBERS


class CalledError(Exception):
    """By the model."""


async def test_pydantic_ai_tool(pydantic_model: Any) -> None:
    def get_weather(city: str) -> str:
        raise CalledError(city)

    tool = pydantic_ai.Tool.from_schema(get_weather, FUNCTION["name"], FUNCTION["description"], FUNCTION["parameters"])
    with pytest.raises(CalledError, match=r"^Paris$"):
        await pydantic_ai.Agent(pydantic_model, tools=[tool], model_settings=PLAIN).run(CALL)


async def test_pydantic_ai_native_structured_output(pydantic_model: Any) -> None:
    agent = pydantic_ai.Agent(pydantic_model, output_type=pydantic_ai.NativeOutput(Person), model_settings=PLAIN)
    assert (await agent.run(WRITE_PERSON)).output == Person(name="Anna", age=31)


async def test_pydantic_ai_structured_output_through_a_required_tool(pydantic_model: Any) -> None:
    agent = pydantic_ai.Agent(pydantic_model, output_type=Person, model_settings=PLAIN)
    assert (await agent.run(WRITE_PERSON)).output == Person(name="Anna", age=31)


# --- smolagents


@smol_tool
def get_weather(city: str) -> str:
    """The weather in a city now.

    Args:
        city: Name of the city
    """
    return f"{city}: {WEATHER}"


@pytest.fixture
def smol(url: str, model: str) -> Any:
    return OpenAIServerModel(model_id=model, api_base=f"{url}/v1", api_key="none", temperature=0, max_tokens=60)


def smol_ask(text: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def test_smolagents_chat_and_stream(smol: Any) -> None:
    assert "Paris" in smol.generate(smol_ask(QUESTION)).content
    assert "".join(piece.content or "" for piece in smol.generate_stream(smol_ask(COUNT))).strip() == NUMBERS


def test_smolagents_required_tool(smol: Any) -> None:
    answer = smol.generate(smol_ask(CALL), tools_to_call_from=[get_weather])
    assert [call.function.name for call in answer.tool_calls] == ["get_weather"]


def test_smolagents_structured_output(smol: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema(), "strict": True}}
    assert Person.model_validate_json(smol.generate(smol_ask(WRITE_PERSON), response_format=form).content) == Person(name="Anna", age=31)
