"""OpenAI's dialect: chat, embeddings, models (completions.py has the rest); and /tokenize, /detokenize as vLLM has them.

Bodies become requests of the engine, chunks become events; nothing here knows how a model works. The answer that is not streamed
is the stream, folded.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from qwen2.server.answering import Answering, EventsResponse, collected, events
from qwen2.server.errors import ApiError
from qwen2.server.openai_schema import Chat, Detokenize, Embedding, Sampling, Tokenize
from qwen2.tokenizer.messages import check_object

if TYPE_CHECKING:
    from qwen2.engine.asked import Asked
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Chunk, Output, TokenLogprob
    from qwen2.server.app import Server

router = APIRouter()
Json = dict[str, Any]


def server_of(request: Request) -> Server:
    """What the application holds."""
    found: Server = request.app.state.server
    return found


# --- models


@router.get("/v1/models")
async def models(request: Request) -> Json:
    """Those that are here."""
    stored = server_of(request).models.store.list()
    return {"object": "list", "data": [_model(one.name, one.path.stat().st_mtime) for one in stored if one.path.exists()]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Json:
    """One of them."""
    server = server_of(request)
    full = server.models.full_name(name)
    return _model(full, server.models.store.find(full).stat().st_mtime)


def _model(name: str, changed: float) -> Json:
    return {"id": name, "object": "model", "created": int(changed), "owned_by": "qwen2"}


# --- chat

ASIDE = {"id", "extra", "annotations", "reasoning_content"}  # of messages: what clients note for themselves, or show beside a text


def conversation(messages: Sequence[Json]) -> list[Json]:
    """Messages without what says nothing: answers come back as clients hold them, with keys that are null. Developers are the system."""
    kept = [{key: value for key, value in one.items() if value is not None and key not in ASIDE} for one in messages]
    return [as_read(one | {"role": "system"} if one.get("role") == "developer" else one) for one in kept]


def as_read(message: Json) -> Json:
    """A message whose calls are whole. One that was cut off, at max_tokens say, is text again, so that the conversation can go on."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not any(map(_is_cut, calls)):
        return message
    content = message.get("content") or ""
    texts = [f'{{"name": "{one["function"].get("name")}", "arguments": {one["function"]["arguments"]}' for one in calls if _is_cut(one)]
    text = content if not isinstance(content, str) else "\n".join([*([content] if content else []), *texts])
    whole = [one for one in calls if not _is_cut(one)]
    rest = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": text}
    return rest | ({"tool_calls": whole} if whole else {})


def _is_cut(call: Any) -> bool:
    """Whether a call's arguments are the beginning of an object and no more."""
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str) or (arguments.strip() and not arguments.lstrip().startswith("{")):
        return False
    try:
        check_object(arguments, "arguments")
    except ValueError:
        return True
    return False


@router.post("/v1/chat/completions")
async def chat(body: Chat, request: Request) -> Response:
    """A conversation's next message."""
    server = server_of(request)
    server.check(body)
    server.check_messages(body.messages)
    if body.max_tokens is not None and body.max_completion_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ: send one of them", field="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs: true", field="top_logprobs")
    go_on = bool(body.continue_final_message)
    if body.add_generation_prompt is not None and body.add_generation_prompt == go_on:
        raise ApiError(
            400, "add_generation_prompt opens a new turn, and continue_final_message goes on with one: send one of them", field="messages"
        )
    if go_on and (not body.messages or body.messages[-1].get("role") != "assistant"):
        raise ApiError(400, "continue_final_message goes on with an assistant's message, and the last is none", field="messages")
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    tools = None if body.tool_choice == "none" else body.tools
    if body.tool_choice == "auto" and not body.tools:
        raise ApiError(400, "tool_choice needs tools to choose from", field="tool_choice")

    def ask(llm: LLM) -> list[Asked]:
        params = body.params(most, logprobs, body.form(), body.prompt_logprobs)
        return first_come([llm.ask(conversation(body.messages), params, tools, body.choice, in_pieces=True, go_on=go_on)], body.priority)

    answering = await server.answer(request, body.model, ask, answers=body.samples)
    writer = ChatWriter(answering, body.choice.parallel, body.prompt_logprobs)
    return await respond(request, body, answering, writer)


def first_come(asked: list[Asked], priority: int) -> list[Asked]:
    """The same, to be served before those of a larger priority."""
    for one in asked:
        one.request.priority = priority
    return asked


async def respond(request: Request, body: Sampling, answering: Answering, writer: Writer) -> Response:
    """Events, or the whole."""
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventsResponse(answering, events(writer.stream(usage), "openai", b"data: [DONE]\n\n"), "openai")
    return JSONResponse(writer.whole(await collected(request, answering)))


class Writer(Protocol):
    """What makes objects of answers."""

    def stream(self, include_usage: bool) -> AsyncIterator[Json]:
        """As they come."""

    def whole(self, groups: Sequence[Sequence[Output]]) -> Json:
        """In one."""


class ChatWriter:
    """One answer as OpenAI's chat objects."""

    def __init__(self, answering: Answering, parallel: bool, prompt_top: int | None = None) -> None:
        self.answering, self.llm, self.parallel, self.prompt_top = answering, answering.llm, parallel, prompt_top
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.calls: dict[int, int] = {}  # by sample, how many were sent

    def head(self, kind: str) -> Json:
        """What every object begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.answering.name}

    async def stream(self, include_usage: bool) -> AsyncIterator[Json]:
        """Chunks as they come; with usage in one of its own if it was asked for."""
        begun: set[int] = set()
        last: list[Chunk] = []
        async for _, chunk in self.answering:
            if chunk.index not in begun:
                begun.add(chunk.index)
                yield self._chunk(chunk.index, {"role": "assistant", "content": ""}, None, include_usage)
            logprobs = _chat_logprobs(self.llm, chunk.logprobs) if chunk.logprobs else None
            for delta in self._deltas(chunk):
                yield self._chunk(chunk.index, delta, None, include_usage, logprobs)
                logprobs = None  # once, however many deltas the tokens make
            if chunk.output is not None:
                last.append(chunk)
                yield self._chunk(chunk.index, {}, chunk.output.finish_reason, include_usage)
        if include_usage:
            outputs = [chunk.output for chunk in last if chunk.output is not None]
            yield self.head("chat.completion.chunk") | {"choices": [], "usage": usage_of(outputs), "timings": timings_of(outputs)}

    def _chunk(self, index: int, delta: Json, reason: str | None, include_usage: bool, logprobs: Json | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.head("chat.completion.chunk") | {"choices": [choice]} | ({"usage": None} if include_usage else {})

    def _deltas(self, chunk: Chunk) -> list[Json]:
        """What is new, as messages grow: content, and calls, in pieces only where their form is certain from the start."""
        if not self.answering.has_tools:
            return [{"content": chunk.text}] if chunk.text or chunk.logprobs else []
        found: list[Json] = []
        for delta in chunk.deltas:
            count = self.calls.get(chunk.index, 0)
            if delta.call is not None and (self.parallel or not count):
                found.append(self._call(chunk.index, count, delta.call.name, delta.call.arguments))
            elif delta.begins is not None:
                found.append(self._call(chunk.index, count, delta.begins, ""))
            elif delta.arguments:
                found.append({"tool_calls": [{"index": count - 1, "function": {"arguments": delta.arguments}}]})
            elif delta.content:
                found.append({"content": delta.content})
        return found or ([{"content": ""}] if chunk.logprobs else [])

    def _call(self, sample: int, index: int, name: str, arguments: str) -> Json:
        self.calls[sample] = index + 1
        call = {"id": call_id(self.id, sample, index), "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"tool_calls": [{"index": index, **call}]}

    def whole(self, groups: Sequence[Sequence[Output]]) -> Json:
        """The answer in one."""
        outputs = groups[0]
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        whole = self.head("chat.completion") | {"choices": choices, "usage": usage_of(outputs), "timings": timings_of(outputs)}
        if self.prompt_top is None:
            return whole
        return whole | {"prompt_logprobs": prompt_logprobs(self.llm, outputs[0].prompt_logprobs, self.prompt_top)}

    def _choice(self, index: int, output: Output) -> Json:
        message: Json = {"role": "assistant", "content": output.text if output.content is None else output.content, "refusal": None}
        calls = output.tool_calls if self.parallel else output.tool_calls[:1]
        if calls:
            message["content"] = output.content or None
            message["tool_calls"] = [
                {"id": call_id(self.id, index, i), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for i, call in enumerate(calls)
            ]
        logprobs = None if output.logprobs is None else _chat_logprobs(self.llm, output.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": output.finish_reason}


def call_id(answer: str, sample: int, index: int) -> str:
    """The same in the stream and in the whole."""
    return f"call_{answer.removeprefix('chatcmpl-')}_{sample}_{index}"


def usage_of(outputs: Sequence[Output], prompts: int = 1) -> Json:
    """Counts of a request: its prompt once, all samples' tokens."""
    firsts = outputs[:: max(1, len(outputs) // prompts)]
    prompt = sum(output.usage.prompt_tokens for output in firsts)
    completion = sum(output.usage.completion_tokens for output in outputs)
    cached = sum(output.usage.cached_tokens for output in firsts)
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


def timings_of(outputs: Sequence[Output]) -> Json:
    """Seconds; an extension."""
    return {
        "prompt_seconds": round(max((output.timings.prompt_seconds for output in outputs), default=0.0), 6),
        "decode_seconds": round(max((output.timings.decode_seconds for output in outputs), default=0.0), 6),
    }


def _chat_logprobs(llm: LLM, logprobs: Sequence[TokenLogprob]) -> Json:
    def one(token: int, logprob: float) -> Json:
        data = llm.tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(data)}

    content = [one(each.token_id, each.logprob) | {"top_logprobs": [one(*pair) for pair in each.top]} for each in logprobs]
    return {"content": content, "refusal": None}


def prompt_logprobs(llm: LLM, found: Sequence[TokenLogprob | None] | None, top: int) -> list[Json | None]:
    """As vLLM has them: for each token of the prompt itself and the likeliest in its place, by id; null for the first."""

    def one(token: int, logprob: float, rank: int) -> Json:
        text = llm.tokenizer.token_bytes(token).decode("utf-8", errors="replace")
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    told: list[Json | None] = []
    for each in found or ():
        if each is None:
            told.append(None)
            continue
        likeliest = {str(token): one(token, logprob, i + 1) for i, (token, logprob) in enumerate(each.top[:top])}
        told.append({str(each.token_id): one(each.token_id, each.logprob, each.rank)} | likeliest)
    return told


def listed(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    """One prompt as a list of one."""
    return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)


# --- numbers and tokens


@router.post("/v1/embeddings")
async def embeddings(body: Embedding, request: Request) -> Response:
    """Mean-pooled last hidden states, of length one."""
    server = server_of(request)
    server.models.full_name(body.model)
    texts = listed(body.input)
    if not texts:
        raise ApiError(400, f"input has 0 texts: 1 to {server.settings.limits.inputs:,} at once", field="input")
    found = await server.embed(request, body.model, texts)
    vectors = found.shortened(body.dimensions)

    def written() -> Response:  # millions of numbers
        data = []
        for index, vector in enumerate(vectors):
            values: Any = vector.tolist()
            if body.encoding_format == "base64":
                values = base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": values})
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        return JSONResponse({"object": "list", "data": data, "model": found.name, "usage": usage})

    return await asyncio.to_thread(written)


@router.post("/tokenize")
async def tokenize(body: Tokenize, request: Request) -> Response:
    """A text's or a conversation's ids, and how many there may be."""
    server = server_of(request)
    server.models.full_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "tokenize takes a prompt or messages, one of them", field="prompt")
    server.check_messages(body.messages or ())
    async with server.model(request, body.model) as llm:
        return await asyncio.to_thread(tokenized, llm, body)


def tokenized(llm: LLM, body: Tokenize) -> Response:
    """The answer, written out: there may be millions of ids."""
    if body.messages is None:
        assert body.prompt is not None, "one of them is there"
        ids = llm.tokenizer.encode(body.prompt)
    else:
        ids = llm.render(conversation(body.messages), body.tools, body.add_generation_prompt).ids
    found: Json = {"count": len(ids), "max_model_len": llm.window, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = [llm.tokenizer.token_bytes(token).decode("utf-8", errors="replace") for token in ids]
    return JSONResponse(found)


@router.post("/detokenize")
async def detokenize(body: Detokenize, request: Request) -> Json:
    """Text of ids."""
    async with server_of(request).model(request, body.model) as llm:

        def decoded() -> str:
            if body.tokens:
                llm.engine.check_ids("tokens", body.tokens)
            return llm.tokenizer.decode(body.tokens)

        return {"prompt": await asyncio.to_thread(decoded)}
