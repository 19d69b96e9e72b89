"""OpenAI's newer dialect, POST /v1/responses: text and function tools, streamed or whole. Nothing is stored between requests.

Spec: platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field

from qwen2.engine.calls import ToolChoice
from qwen2.engine.constraint import Constraint
from qwen2.engine.request import SamplingParams
from qwen2.server.answering import Answering, EventsResponse, collected, events
from qwen2.server.errors import FAILURES, ApiError, of_engine
from qwen2.server.openai import as_read, server_of
from qwen2.server.openai_schema import Body, Chosen, Off, PlainFormat, choosable, offered
from qwen2.tokenizer import Delta

if TYPE_CHECKING:
    from qwen2.engine.asked import Asked
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Chunk, Output

router = APIRouter(prefix="/v1/responses")
Json = dict[str, Any]


class Part(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Said(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    id: str | None = None
    status: str | None = None


class Call(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class Result(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]
    id: str | None = None
    status: str | None = None


class Thought(Body):
    """What another model thought before it answered: left out of the prompt."""

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: str | None = None


class Tool(Body):
    type: Literal["function"]
    name: str
    parameters: Json | None = None
    description: str | None = None
    strict: bool | None = None


class NamedTool(Body):
    type: Literal["function"]
    name: str


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: str
    description: str | None = None
    strict: bool | None = None
    schema_: Json | bool = Field(alias="schema")

    def constraint(self) -> Constraint:
        """The form that answers are held to."""
        return Constraint.json_schema(self.schema_)


class TextFormat(Body):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None  # OpenAI's default, as clients send it


class Reasoning(Body):
    """How much a model may reason, and what is shown of it: these do not."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


PARTS = ("input_text", "output_text", "text")
ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _readable(items: Any) -> Any:
    """The input as it came, where all is of kinds that there are."""
    for item in offered(items, ITEMS, "an item") if isinstance(items, list) else ():
        if isinstance(item, dict) and item.get("type") != "reasoning":
            offered(item.get("content"), PARTS)
            offered(item.get("output"), PARTS)
    return items


class Ask(Chosen):
    """What the route takes."""

    model: str
    input: Annotated[str | list[Said | Call | Result | Thought], BeforeValidator(_readable)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = Field(default=None, ge=1)  # of OpenAI's own tools, of which there is none
    stream: bool = False
    tools: Annotated[list[Tool] | None, BeforeValidator(partial(offered, kinds=("function",), place="a tool"))] = None
    tool_choice: Annotated[Literal["auto", "none", "required"] | NamedTool | None, BeforeValidator(choosable)] = None
    parallel_tool_calls: bool | None = None
    text: TextFormat | None = None
    truncation: Literal["disabled"] | None = None
    background: Off | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None  # of which there is none
    reasoning: Reasoning | None = None  # no effect
    top_logprobs: int | None = Field(default=None, ge=0, le=0)  # none, as it is where the field is left out

    def params(self) -> SamplingParams:
        """As the engine takes them."""
        form = None if self.text is None or self.text.format is None else self.text.format.constraint()
        return SamplingParams(**self.chosen(), max_tokens=self.max_output_tokens, constraint=form)

    def messages(self) -> list[Json]:
        """The input as messages: calls join the assistant's message before them."""
        found: list[Json] = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        items = [Said(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            if isinstance(item, Said):
                found.append({"role": {"developer": "system"}.get(item.role, item.role), "content": _text(item.content)})
            elif isinstance(item, Result):
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            elif isinstance(item, Call):
                if not found or found[-1]["role"] != "assistant":
                    found.append({"role": "assistant", "content": ""})
                call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
                found[-1].setdefault("tool_calls", []).append(call)
        return [as_read(one) for one in found]

    def functions(self) -> list[Json] | None:
        """Tools as chat has them."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [
            {
                "type": "function",
                "function": {
                    "name": one.name,
                    "description": one.description or "",
                    "parameters": one.parameters or {},
                    "strict": one.strict,
                },
            }
            for one in self.tools
        ]

    @property
    def choice(self) -> ToolChoice:
        """As the engine takes it: a named function is called once, as OpenAI does it."""
        if isinstance(self.tool_choice, NamedTool):
            return ToolChoice(name=self.tool_choice.name, parallel=False)
        return ToolChoice("required" if self.tool_choice == "required" else "auto", parallel=self.parallel_tool_calls is not False)


def _text(content: str | list[Part]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


@router.post("")
async def respond(body: Ask, request: Request) -> Response:
    """An answer."""
    server = server_of(request)
    server.check_messages([] if isinstance(body.input, str) else body.input, "input")
    server.check_stops(body.stops)

    def ask(llm: LLM) -> list[Asked]:
        return [llm.ask(body.messages(), body.params(), body.functions(), body.choice, in_pieces=True)]

    answering = await server.answer(request, body.model, ask)
    writer = Writer(answering, body)
    if body.stream:
        return EventsResponse(answering, events(writer.stream(), "responses", b""), "responses")
    output = (await collected(request, answering))[0][0]
    return JSONResponse(writer.response(output, writer.items(output)))


class Writer:
    """One answer as a response object, or as the events that make it."""

    def __init__(self, answering: Answering, body: Ask) -> None:
        self.answering, self.body = answering, body
        self.key, self.created = secrets.token_hex(12), int(time.time())
        self.parallel = body.choice.parallel
        self.done: list[Json] = []  # items of the stream that have ended

    def response(self, output: Output | None, items: list[Json]) -> Json:
        """The object, with what was asked for beside what came of it."""
        body = self.body
        status = "in_progress" if output is None else "incomplete" if output.finish_reason == "length" else "completed"
        asked = body.model_dump(include={"instructions", "max_output_tokens", "max_tool_calls", "metadata", "user"})
        used = self.answering.asked[0].request.params  # the model's own defaults where the request is silent
        asked |= {"temperature": used.temperature, "top_p": used.top_p, "top_logprobs": 0}
        tools = [] if body.tools is None else [tool.model_dump() for tool in body.tools]
        head = {"id": f"resp_{self.key}", "object": "response", "created_at": self.created, "status": status, "error": None}
        head |= {"incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None, "model": self.answering.name}
        head |= asked | {"output": items, "tools": tools, "tool_choice": self._choice(), "parallel_tool_calls": self.parallel}
        head |= {
            "previous_response_id": None,
            "reasoning": None,
            "text": self._format(),
            "truncation": "disabled",
            "store": False,
        }
        return head | {"usage": None if output is None else usage_of(output)}

    def _choice(self) -> str | Json:
        choice = self.body.tool_choice
        return choice.model_dump() if isinstance(choice, NamedTool) else choice or "auto"

    def _format(self) -> Json:
        text = self.body.text
        return {"format": {"type": "text"}} if text is None or text.format is None else text.model_dump(by_alias=True, exclude_none=True)

    def items(self, output: Output) -> list[Json]:
        """What the whole answer consists of."""
        text = output.text if output.content is None else output.content
        found = [self._message(0, text, _status(output, bool(output.tool_calls)))] if text or not output.tool_calls else []
        for call in output.tool_calls if self.parallel else output.tool_calls[:1]:
            found.append(self._call(len(found), call.name, call.arguments, "incomplete" if call.cut else "completed"))
        return found

    def _message(self, index: int, text: str | None, status: str) -> Json:
        content = [] if text is None else [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
        return {"type": "message", "id": f"msg_{self.key}_{index}", "status": status, "role": "assistant", "content": content}

    def _call(self, index: int, name: str, arguments: str, status: str) -> Json:
        ids = {"id": f"fc_{self.key}_{index}", "call_id": f"call_{self.key}_{index}"}
        return {"type": "function_call", **ids, "name": name, "arguments": arguments, "status": status}

    async def stream(self) -> AsyncIterator[Json]:
        """Events, numbered."""
        number = 0
        try:
            async for event in self._events():
                yield event | {"sequence_number": number}
                number += 1
        except (*FAILURES, ApiError) as error:
            for event in self._failed(of_engine(error)):
                yield event | {"sequence_number": number}
                number += 1

    def _failed(self, error: ApiError) -> list[Json]:
        """How a stream ends that cannot go on."""
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        told = {"status": "failed", "error": {"code": code, "message": error.message}}
        return [
            {"type": "error", "code": error.code or code, "message": error.message, "param": error.field},
            {"type": "response.failed", "response": self.response(None, self.done) | told},
        ]

    async def _events(self) -> AsyncIterator[Json]:
        begun = self.response(None, [])
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        items = self.done
        text: str | None = None
        async for _, chunk in self.answering:
            for delta in self._news(chunk):
                if delta.content:
                    if text is None:
                        for event in self._begin_text(len(items)):
                            yield event
                    text = (text or "") + delta.content
                    place = {"item_id": f"msg_{self.key}_{len(items)}", "output_index": len(items), "content_index": 0}
                    yield {"type": "response.output_text.delta", **place, "delta": delta.content, "logprobs": []}
                elif self.parallel or not any(item["type"] == "function_call" for item in items):
                    if text is not None:
                        for event in self._end_text(items, text):
                            yield event
                        text = None
                    for event in self._call_events(items, delta):
                        yield event
            if chunk.output is not None:
                if text is not None or not items:
                    begins = [] if text is not None else self._begin_text(len(items))
                    for event in (*begins, *self._end_text(items, text or "", chunk.output)):
                        yield event
                done = self.response(chunk.output, items)
                yield {"type": f"response.{done['status']}", "response": done}

    def _news(self, chunk: Chunk) -> Sequence[Delta]:
        if not self.answering.has_tools:
            return [Delta(chunk.text)] if chunk.text else []
        return chunk.deltas

    def _begin_text(self, index: int) -> list[Json]:
        item, part = self._message(index, None, "in_progress"), {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [
            {"type": "response.output_item.added", "output_index": index, "item": item},
            {"type": "response.content_part.added", "item_id": item["id"], "output_index": index, "content_index": 0, "part": part},
        ]

    def _end_text(self, items: list[Json], text: str, output: Output | None = None) -> list[Json]:
        """`output`: where the text is the answer's end."""
        called = any(item["type"] == "function_call" for item in items)
        index, item = len(items), self._message(len(items), text, "completed" if output is None else _status(output, called))
        items.append(item)
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        return [
            {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
            {"type": "response.content_part.done", **place, "part": item["content"][0]},
            {"type": "response.output_item.done", "output_index": index, "item": item},
        ]

    def _call_events(self, items: list[Json], delta: Delta) -> list[Json]:
        """Of a whole call, or of a piece of one; it joins the items when it ends."""
        index, events = len(items), list[Json]()
        name, arguments, call = delta.begins, delta.arguments, delta.ends
        if delta.call is not None:
            name, arguments, call = delta.call.name, delta.call.arguments, delta.call
        if name is not None:
            item = self._call(index, name, "", "in_progress")
            events.append({"type": "response.output_item.added", "output_index": index, "item": item})
        place = {"item_id": f"fc_{self.key}_{index}", "output_index": index}
        if arguments:
            events.append({"type": "response.function_call_arguments.delta", **place, "delta": arguments})
        if call is not None:
            items.append(self._call(index, call.name, call.arguments, "incomplete" if call.cut else "completed"))
            events += [
                {"type": "response.function_call_arguments.done", **place, "name": call.name, "arguments": call.arguments},
                {"type": "response.output_item.done", "output_index": index, "item": items[-1]},
            ]
        return events


def _status(output: Output, called: bool) -> str:
    """Of the answer's text: what was cut off is that, unless it is a call or what stands behind one."""
    return "incomplete" if output.finish_reason == "length" and not called else "completed"


def usage_of(output: Output) -> Json:
    """Counts under this dialect's names."""
    usage = output.usage
    read = {"input_tokens": usage.prompt_tokens, "input_tokens_details": {"cached_tokens": usage.cached_tokens}}
    written = {"output_tokens": usage.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0}}
    return read | written | {"total_tokens": usage.total_tokens}
