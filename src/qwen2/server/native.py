"""Our own dialect, for `qwen2 run`: the engine's own values as JSON, so that an answer through a server is told as one of this process.

GET /qwen2 says whose server this is; the rest loads a model, counts, answers line by line, ends an answer that is being written,
whose last line then still comes with its counts, and unloads a model whoever uses it, for `qwen2 stop`. Left out: tools, which a
conversation by hand has none of.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from qwen2 import __version__
from qwen2.engine.about import about, peak_memory
from qwen2.engine.request import SamplingParams
from qwen2.server.answering import Answering, EventsResponse, events
from qwen2.server.errors import ApiError
from qwen2.server.openai import server_of
from qwen2.server.openai_schema import Body

if TYPE_CHECKING:
    from qwen2.engine.asked import Asked
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Chunk, Output

router = APIRouter(prefix="/qwen2", include_in_schema=False)  # between programs of one version
Json = dict[str, Any]


class Open(Body):
    """POST /qwen2/open."""

    model: str


class Stop(Body):
    """POST /qwen2/stop."""

    model: str


class Count(Body):
    """POST /qwen2/count."""

    model: str
    messages: list[Json]


class Ask(Body):
    """POST /qwen2/chat. `id` is the client's own for this answer, by which it can end it; nobody else knows it."""

    model: str
    id: str = Field(min_length=16, max_length=64)
    messages: list[Json]
    params: Json = Field(default_factory=dict)


class End(Body):
    """POST /qwen2/end."""

    id: str


@router.get("")
async def who(request: Request) -> Json:
    """Whose server this is, of which version, and of which store."""
    return {"program": "qwen2", "version": __version__, "store": server_of(request).models.store.identity}


@router.post("/open")
async def open_model(body: Open, request: Request) -> Json:
    """Load a model where it is not in memory."""
    start = time.perf_counter()
    async with server_of(request).model(request, body.model) as llm:
        return {"about": about(llm).to_json(), "seconds": time.perf_counter() - start}


@router.post("/stop")
async def stop_model(body: Stop, request: Request) -> Json:
    """Unload a model; what it is writing is broken off. Whether it was in memory, and how many requests were using it."""
    models = server_of(request).models
    full = models.full_name(body.model)
    loaded = models.loaded.get(full)
    if loaded is None:
        return {"unloaded": False, "broken_off": 0}
    users = loaded.users
    del loaded
    models.unload(full)
    return {"unloaded": True, "broken_off": users}


@router.post("/count")
async def count(body: Count, request: Request) -> Json:
    """Tokens of a conversation as the model reads it, without the opening of an answer."""
    server = server_of(request)
    server.check_messages(body.messages)
    async with server.model(request, body.model) as llm:
        rendered = await asyncio.to_thread(llm.render, body.messages, add_generation_prompt=False)
        return {"tokens": len(rendered.ids)}


@router.post("/chat")
async def chat(body: Ask, request: Request) -> Response:
    """An answer as lines: chunks, the last of each sample with its output."""
    server = server_of(request)
    biases = body.params.get("logit_bias")
    if isinstance(biases, dict):  # JSON's keys are texts
        body.params["logit_bias"] = {int(token) if token.isdecimal() else token: bias for token, bias in biases.items()}
    params = SamplingParams.from_dict(body.params)
    server.check_stops(params.stop or ())
    server.check_messages(body.messages)
    if params.n > server.settings.limits.samples:
        raise ApiError(400, f"n is {params.n}: this server writes at most {server.settings.limits.samples} samples of one request")
    if body.id in server.ended_by_id:
        raise ApiError(400, "id: an answer of that id is being written")

    def ask(llm: LLM) -> list[Asked]:
        return [llm.ask(body.messages, params)]

    answering = await server.answer(request, body.model, ask, answers=params.n)
    server.ended_by_id[body.id] = lambda: answering.llm.engine.abort(answering.asked[0].request)
    answering.at_end(lambda: server.ended_by_id.pop(body.id))
    return EventsResponse(answering, events(_lines(answering), "ollama", b""), "ollama")


@router.post("/end")
async def end(body: End, request: Request) -> Json:
    """End an answer; whether there is one of that id."""
    abort = server_of(request).ended_by_id.get(body.id)
    if abort is not None:
        abort()
    return {"ended": abort is not None}


async def _lines(answering: Answering) -> AsyncIterator[Json]:
    async for _, chunk in answering:
        yield _chunk(chunk, answering)


def _chunk(chunk: Chunk, answering: Answering) -> Json:
    found: Json = {"text": chunk.text, "index": chunk.index}
    if chunk.output is None:
        return found
    memory = peak_memory(answering.llm.model.device.type)
    return found | {"output": _output(chunk.output), "memory": memory}


def _output(output: Output) -> Json:
    values = asdict(output)
    values["params"]["logit_bias"] = {str(token): bias for token, bias in output.params.logit_bias.items()}
    return {key: value for key, value in values.items() if key not in ("others", "content", "tool_calls")}
