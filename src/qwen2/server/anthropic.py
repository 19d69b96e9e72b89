"""Anthropic's dialect, as coding agents speak it: POST /v1/messages with text and tools, streamed or whole, and count_tokens.

Spec: docs.anthropic.com/en/api/messages. Marks of what to cache are accepted and have no effect: every prompt's beginning is looked for
in the cache here. These models do not reason: what is said of thinking is accepted, and thoughts of others are left out of the prompt.
Of `usage`, `input_tokens` are those that were read and `cache_read_input_tokens` those that were not.
"""

from __future__ import annotations

import asyncio
import json
import secrets
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
from qwen2.server.errors import ApiError
from qwen2.server.openai import server_of
from qwen2.server.openai_schema import Body, offered
from qwen2.tokenizer import Delta, closed

if TYPE_CHECKING:
    from qwen2.engine.asked import Asked
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Chunk, Output
    from qwen2.tokenizer import ToolCall

router = APIRouter(prefix="/v1/messages")
Json = dict[str, Any]
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Text(Body):
    type: Literal["text"]
    text: str
    cache_control: Json | None = None
    citations: None = None


class ToolUse(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Json
    cache_control: Json | None = None


class ToolResult(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[str | list[Text], BeforeValidator(partial(offered, kinds=("text",)))] = ""
    is_error: bool | None = None
    cache_control: Json | None = None


class Thought(Body):
    """What another model thought before it answered: left out of the prompt."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    cache_control: Json | None = None


Block = Annotated[Text | ToolUse | ToolResult | Thought, Field(discriminator="type")]
KINDS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


class Message(Body):
    role: Literal["user", "assistant"]
    content: Annotated[str | list[Block], BeforeValidator(partial(offered, kinds=KINDS))]


class Tool(Body):
    name: str
    input_schema: Json
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None
    cache_control: Json | None = None
    eager_input_streaming: bool | None = None  # calls of a certain form come in pieces anyway


class AnyTool(Body):
    type: Literal["auto", "none", "any"]
    disable_parallel_tool_use: bool = False


class NamedTool(Body):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    """How much a model may reason, and what is shown of it: these do not."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: Json = Field(alias="schema")


class OutputConfig(Body):
    """The form of the answer; the schema always holds. Effort is a matter of reasoning."""

    format: OutputFormat | None = None
    effort: str | None = None


class Harmless(Body):
    """Fields that coding agents send, and that cannot change these models' answers."""

    thinking: Thinking | None = None
    context_management: Json | None = None  # how a service shortens long prompts: here one is read whole, or refused with both counts
    cache_control: Json | None = None
    betas: list[str] | None = None  # which features of the service the client knows
    metadata: Json | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None  # where the service computes


class Prompt(Harmless):
    """What both routes take."""

    model: str
    messages: list[Message]
    system: str | list[Text] | None = None
    tools: Annotated[list[Tool] | None, BeforeValidator(partial(offered, kinds=("custom",), place="a tool"))] = None
    tool_choice: Annotated[AnyTool | NamedTool, Field(discriminator="type")] | None = None
    output_config: OutputConfig | None = None


class Messages(Prompt):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def params(self) -> SamplingParams:
        """As the engine takes them."""
        config = self.output_config
        form = None if config is None or config.format is None else Constraint.json_schema(config.format.schema_)
        draws: Json = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return SamplingParams(**draws, stop=self.stop_sequences, max_tokens=self.max_tokens, constraint=form)


# --- in


def conversation(body: Prompt) -> list[Json]:
    """The messages as OpenAI shapes them: results of tools are messages of their own, before what the user says beside them."""
    found: list[Json] = []
    if body.system is not None:
        found.append({"role": "system", "content": _joined(body.system)})
    for message in body.messages:
        blocks = [Text(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        found += _assistant(blocks) if message.role == "assistant" else _user(blocks)
    return found


def _joined(content: str | Sequence[Text]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _result(block: ToolResult) -> str:
    """What a tool gave; that it failed is said in words, since the chat formats have no other place for it."""
    text = _joined(block.content)
    return f"error: {text}" if block.is_error else text


def _user(blocks: Sequence[Block]) -> list[Json]:
    if any(isinstance(block, ToolUse) for block in blocks):
        raise ApiError(400, "messages: tool_use is the assistant's, not the user's", field="messages")
    results = [block for block in blocks if isinstance(block, ToolResult)]
    texts = [block for block in blocks if isinstance(block, Text)]
    found: list[Json] = [{"role": "tool", "tool_call_id": one.tool_use_id, "content": _result(one)} for one in results]
    return found + ([{"role": "user", "content": _joined(texts)}] if texts or not results else [])


def _assistant(blocks: Sequence[Block]) -> list[Json]:
    if any(isinstance(block, ToolResult) for block in blocks):
        raise ApiError(400, "messages: tool_result is the user's, not the assistant's", field="messages")
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in blocks
        if isinstance(block, ToolUse)
    ]
    text = _joined([block for block in blocks if isinstance(block, Text)])
    return [{"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})]


def tools_of(body: Prompt) -> list[Json] | None:
    """Tools as OpenAI shapes them."""
    if not body.tools or (body.tool_choice is not None and body.tool_choice.type == "none"):
        return None
    functions = [
        {"name": one.name, "description": one.description or "", "parameters": one.input_schema, "strict": one.strict} for one in body.tools
    ]
    return [{"type": "function", "function": function} for function in functions]


def choice_of(body: Prompt) -> ToolChoice:
    """As the engine takes it."""
    choice = body.tool_choice
    if choice is None:
        return ToolChoice()
    parallel = not choice.disable_parallel_tool_use
    if isinstance(choice, NamedTool):
        return ToolChoice(name=choice.name, parallel=parallel)
    return ToolChoice("required" if choice.type == "any" else "auto", parallel=parallel)


@router.post("")
async def messages(body: Messages, request: Request) -> Response:
    """The assistant's next message."""
    server = server_of(request)
    server.models.full_name(body.model)
    server.check_stops(body.stop_sequences or [])
    server.check_messages(body.messages)

    def ask(llm: LLM) -> list[Asked]:
        return [llm.ask(conversation(body), body.params(), tools_of(body), choice_of(body), in_pieces=True, go_on=True)]

    answering = await server.answer(request, body.model, ask)
    writer = Writer(answering, choice_of(body).parallel)
    if body.stream:
        return EventsResponse(answering, events(writer.stream(), "anthropic", b""), "anthropic")
    return JSONResponse(writer.whole((await collected(request, answering))[0][0]))


@router.post("/count_tokens")
async def count_tokens(body: Prompt, request: Request) -> Json:
    """How many tokens the prompt would have."""
    server = server_of(request)
    server.check_messages(body.messages)

    def count(llm: LLM) -> int:
        messages, tools = conversation(body), tools_of(body)
        begun = messages[-1:] and messages[-1]["role"] == "assistant"
        return len((llm.render_open(messages, tools) if begun else llm.render(messages, tools)).ids)

    async with server.model(request, body.model) as llm:
        return {"input_tokens": await asyncio.to_thread(count, llm)}


# --- out


class Writer:
    """One answer as Anthropic's message, or as the events that make it."""

    def __init__(self, answering: Answering, parallel: bool) -> None:
        self.answering, self.parallel = answering, parallel
        self.id = f"msg_{secrets.token_hex(12)}"

    def _message(self, content: list[Json], output: Output | None) -> Json:
        reason, stopped = (None, None) if output is None else _ending(output)
        request = self.answering.asked[0].request
        usage = _usage(len(request.prompt), request.cached_tokens, 0) if output is None else usage_of(output)
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.answering.name, "content": content}
        return head | {"stop_reason": reason, "stop_sequence": stopped, "usage": usage}

    def whole(self, output: Output) -> Json:
        """The answer in one."""
        text = output.text if output.content is None else output.content
        content: list[Json] = [{"type": "text", "text": text}] if text or not output.tool_calls else []
        calls = output.tool_calls if self.parallel else output.tool_calls[:1]
        for index, call in enumerate(calls):
            content.append({"type": "tool_use", "id": self._call_id(index), "name": call.name, "input": _input(call)})
        return self._message(content, output)

    def _call_id(self, index: int) -> str:
        return f"toolu_{self.id.removeprefix('msg_')}_{index}"

    async def stream(self) -> AsyncIterator[Json]:
        """Blocks as they grow: one of text while the model says something, one for each call."""
        index, open_text, calls, begun = -1, False, 0, False
        async for _, chunk in self.answering:
            if not begun:  # only now it is known how much of the prompt was in the cache
                begun = True
                yield {"type": "message_start", "message": self._message([], None)}
            for delta in self._news(chunk):
                if delta.content and not open_text:
                    index, open_text = index + 1, True
                    yield {"type": "content_block_start", "index": index, "content_block": {"type": "text", "text": ""}}
                if delta.content:
                    yield {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": delta.content}}
                    continue
                name = delta.call.name if delta.call is not None else delta.begins
                if name is not None and calls and not self.parallel:
                    continue
                if open_text:
                    yield {"type": "content_block_stop", "index": index}
                    open_text = False
                if name is not None:
                    index, calls = index + 1, calls + 1
                for event in self._call_events(index, calls - 1, delta):
                    yield event
            if chunk.output is not None:
                if index < 0:  # a message has a block, also where nothing was said
                    index, open_text = 0, True
                    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
                if open_text:
                    yield {"type": "content_block_stop", "index": index}
                reason, stopped = _ending(chunk.output)
                ending = {"stop_reason": reason, "stop_sequence": stopped}
                yield {"type": "message_delta", "delta": ending, "usage": usage_of(chunk.output)}
                yield {"type": "message_stop"}

    def _call_events(self, index: int, number: int, delta: Delta) -> list[Json]:
        """Of a whole call, or of a piece of one."""
        events: list[Json] = []
        name, arguments = delta.begins, delta.arguments
        if delta.call is not None:
            name, arguments = delta.call.name, delta.call.arguments
        if name is not None:
            block = {"type": "tool_use", "id": self._call_id(number), "name": name, "input": {}}
            events.append({"type": "content_block_start", "index": index, "content_block": block})
        if arguments:
            piece = {"type": "input_json_delta", "partial_json": arguments}
            events.append({"type": "content_block_delta", "index": index, "delta": piece})
        if delta.call is not None or delta.ends is not None:
            events.append({"type": "content_block_stop", "index": index})
        return events

    def _news(self, chunk: Chunk) -> Sequence[Delta]:
        """Texts and calls of a chunk, in order."""
        if not self.answering.has_tools:
            return [Delta(chunk.text)] if chunk.text else []
        return chunk.deltas


def _input(call: ToolCall) -> Json:
    """A call's arguments; of one that was cut off, the members that are complete."""
    if not call.cut:
        return dict(json.loads(call.arguments))
    return dict(json.loads(closed(call.arguments)))


def _ending(output: Output) -> tuple[str, str | None]:
    if isinstance(output.stopped_by, str) and output.finish_reason == "stop":
        return "stop_sequence", output.stopped_by
    return REASONS[output.finish_reason], None


def usage_of(output: Output) -> Json:
    """Counts as Anthropic splits them."""
    usage = output.usage
    return _usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)


def _usage(prompt: int, cached: int, written: int) -> Json:
    counts = {"input_tokens": prompt - cached, "output_tokens": written}
    return counts | {"cache_read_input_tokens": cached, "cache_creation_input_tokens": 0}
