"""Ollama's dialect: chat and generate as lines of JSON, and embeddings. Left out: the models of this machine (ollama_models.py).

Durations are nanoseconds. `num_ctx` bounds prompt and answer of one request; no weights are loaded anew for it, since the cache grows
with use. A prompt is never cut: one that does not fit is refused with both counts.
"""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from qwen2.server.answering import Answering, EventsResponse, events, unless_gone
from qwen2.server.errors import ApiError
from qwen2.server.models import UNSAID
from qwen2.server.ollama_models import FIM
from qwen2.server.ollama_schema import Asking, Chat, Embed, Embeddings, Generate
from qwen2.server.openai import server_of
from qwen2.server.settings import lasting, seconds

if TYPE_CHECKING:
    from qwen2.engine.asked import Asked
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Output, TokenLogprob

router = APIRouter(prefix="/api")
Json = dict[str, Any]
ASIDE = ("tool_name", "images", "thinking")  # of messages: what is read apart, or not at all


# --- answers


@router.post("/chat")
async def chat(body: Chat, request: Request) -> Response:
    """A conversation's next message."""
    if not body.messages:
        return await only_load(body, request, {"message": {"role": "assistant", "content": ""}})
    server_of(request).check_messages(body.messages)
    server_of(request).check_stops(body.options.stops)

    def ask(llm: LLM) -> list[Asked]:
        return [llm.ask([_message(one) for one in body.messages], body.params(), body.tools, go_on=True)]

    answering = await server_of(request).answer(request, body.model, ask, stays(body.keep_alive))
    return await respond(request, body, answering, ChatLines(body.model, answering))


@router.post("/generate")
async def generate(body: Generate, request: Request) -> Response:
    """What goes on from a prompt: as a question in the model's template, raw, or between a prompt and a suffix."""
    if not body.prompt and not body.suffix:
        return await only_load(body, request, {"response": ""})
    server_of(request).check_stops(body.options.stops)

    def ask(llm: LLM) -> list[Asked]:
        return [llm.ask(prompt_ids(llm, body), body.params())]

    answering = await server_of(request).answer(request, body.model, ask, stays(body.keep_alive))
    return await respond(request, body, answering, GenerateLines(body.model, answering, with_context=not (body.raw or body.suffix)))


def _message(message: Json) -> Json:
    """Ollama's message as OpenAI shapes it: a tool's result has its name as `tool_name`, calls have arguments as objects."""
    known = {key: value for key, value in message.items() if value is not None and key not in ASIDE}
    if message.get("images"):
        raise ApiError(400, "messages: images are given, and these models read text only")
    if message.get("tool_name") is not None:
        known["name"] = message["tool_name"]
    return known


def prompt_ids(llm: LLM, body: Generate) -> list[int]:
    """The ids that the model goes on from."""
    if body.suffix:
        if body.raw or body.system is not None or body.context is not None:
            raise ApiError(400, "suffix goes with a prompt alone: leave raw, system and context out")
        return fill_in(llm, body.prompt, body.suffix)
    if body.raw:
        if body.system is not None or body.context is not None:
            raise ApiError(400, "raw takes the prompt as it is: leave system and context out")
        llm.tokenizer.check_fits([body.prompt], llm.window)
        return list(llm.tokenizer.encode_trusted(body.prompt))
    system = [] if body.system is None else [{"role": "system", "content": body.system}]
    question = {"role": "user", "content": body.prompt}
    if body.context is None:
        return list(llm.render([*system, question], most=llm.window).ids)
    llm.engine.check_ids("context", body.context)
    before: list[Any] = [*system, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    known = llm.template.render(before).ids
    whole = llm.template.render([*before, question], add_generation_prompt=True, most=llm.window).ids
    ends = [place for place, token in enumerate(known) if token in llm.ends]
    end = ends[-1] + 1 if ends and body.context[-1] in llm.ends else len(known)
    return [*body.context, *whole[end:]]


def fill_in(llm: LLM, prompt: object, suffix: str) -> list[int]:
    """Qwen2.5-Coder technical report, section 3.2.1: prefix, suffix, and then the middle is the model's. ApiError where it cannot be."""
    control, encode = llm.tokenizer.control, llm.tokenizer.encode
    if any(name not in control for name in FIM):
        raise ApiError(400, "suffix: this model has no tokens for filling in the middle", field="suffix")
    if not isinstance(prompt, str):
        raise ApiError(400, "suffix goes with prompts that are texts, not ids", field="suffix")
    first, second, third = (control[name] for name in FIM)
    llm.tokenizer.check_fits([prompt, suffix], llm.window)
    return [first, *encode(prompt), second, *encode(suffix), third]


def stays(keep_alive: float | str | None) -> object:
    """How long the model stays after this request: UNSAID, seconds, or None for good."""
    if keep_alive is None:
        return UNSAID
    if isinstance(keep_alive, str):
        return seconds(keep_alive)
    return lasting(keep_alive)


async def only_load(body: Asking, request: Request, empty: Json) -> Response:
    """Without anything to answer a model is loaded, or, where it shall stay no longer, unloaded when others need it no longer."""
    server = server_of(request)
    full = server.models.full_name(body.model)
    if stays(body.keep_alive) == 0:
        server.models.leave(full)
        reason = "unload"
    else:
        async with server.model(request, full, stays(body.keep_alive)):
            reason = "load"
    return JSONResponse({"model": body.model, "created_at": now(), **empty, "done": True, "done_reason": reason})


async def respond(request: Request, body: Asking, answering: Answering, lines: Lines) -> Response:
    """Lines as they come, or one for all."""
    if body.stream:
        return EventsResponse(answering, events(lines.stream(), "ollama", b""), "ollama")
    try:
        return JSONResponse(await unless_gone(request, lines.whole()))
    finally:
        await answering.close()


class Lines(ABC):
    """One answer as Ollama's objects."""

    @abstractmethod
    def text(self, text: str) -> Json:
        """A text as this kind of answer holds it."""

    @abstractmethod
    def folded(self, before: Json, new: Json) -> Json:
        """Two objects as one."""

    def __init__(self, model: str, answering: Answering) -> None:
        self.model, self.answering, self.llm = model, answering, answering.llm

    def head(self) -> Json:
        """What every object begins with."""
        return {"model": self.model, "created_at": now()}

    async def stream(self) -> AsyncIterator[Json]:
        """Objects as they come, the last with durations and counts."""
        async for _, chunk in self.answering:
            logprobs = {"logprobs": self._logprobs(chunk.logprobs)} if chunk.logprobs else {}
            for shown in self.shown(chunk):
                yield self.head() | shown | {"done": False} | logprobs
                logprobs = {}
            if chunk.output is not None:
                yield self.head() | self.text("") | self._end(chunk.output) | logprobs

    def shown(self, chunk: Any) -> list[Json]:
        """What is new in a chunk."""
        return [self.text(chunk.text)] if chunk.text else []

    async def whole(self) -> Json:
        """The stream, folded."""
        folded: Json = {}
        logprobs: list[Json] = []
        async for one in self.stream():
            logprobs += one.pop("logprobs", [])
            folded = self.folded(folded, one) if folded else one
        return folded | ({"logprobs": logprobs} if logprobs else {})

    def _end(self, output: Output) -> Json:
        usage, timings = output.usage, output.timings
        reason = {"length": "length"}.get(output.finish_reason, "stop")
        prompt, decode = int(timings.prompt_seconds * 1e9), int(timings.decode_seconds * 1e9)
        return {
            "done": True,
            "done_reason": reason,
            "total_duration": int((time.perf_counter() - self.answering.started) * 1e9),  # with what it waited for others
            "load_duration": int(self.answering.load_seconds * 1e9),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": prompt,
            "eval_count": usage.completion_tokens,
            "eval_duration": decode,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[Json]:
        def one(token: int, logprob: float) -> Json:
            return {"token": self.llm.tokenizer.token_bytes(token).decode("utf-8", errors="replace"), "logprob": logprob}

        return [
            one(each.token_id, each.logprob) | ({"top_logprobs": [one(*pair) for pair in each.top]} if each.top else {})
            for each in logprobs
        ]


class ChatLines(Lines):
    """With messages."""

    def text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}}

    def shown(self, chunk: Any) -> list[Json]:
        if not self.answering.has_tools:
            return super().shown(chunk)
        found = []
        for delta in chunk.deltas:
            if delta.call is not None:
                call = {"function": {"name": delta.call.name, "arguments": json.loads(delta.call.arguments)}}
                found.append({"message": {"role": "assistant", "content": "", "tool_calls": [call]}})
            elif delta.content:
                found.append(self.text(delta.content))
        return found

    def folded(self, before: Json, new: Json) -> Json:
        first, second = before["message"], new["message"]
        calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
        message = {"role": "assistant", "content": first["content"] + second["content"]} | ({"tool_calls": calls} if calls else {})
        return new | {"message": message}


class GenerateLines(Lines):
    """With plain text, and the ids of it all to go on from."""

    def __init__(self, model: str, answering: Answering, with_context: bool) -> None:
        super().__init__(model, answering)
        self.with_context = with_context

    def text(self, text: str) -> Json:
        return {"response": text}

    def folded(self, before: Json, new: Json) -> Json:
        return new | {"response": before["response"] + new["response"]}

    def _end(self, output: Output) -> Json:
        context = {"context": [*self.answering.asked[0].request.prompt, *output.token_ids]} if self.with_context else {}
        return super()._end(output) | context


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


# --- embeddings


@router.post("/embed")
async def embed(body: Embed, request: Request) -> Response:
    """Vectors of several texts. One that does not fit is refused, unless `truncate` asks for the vector of its beginning."""
    server, most, keep = server_of(request), body.options.num_ctx, stays(body.keep_alive)
    server.models.full_name(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts:
        return JSONResponse({"model": body.model, "embeddings": []})
    found = await server.embed(request, body.model, texts, keep, most, cut=body.truncate)
    vectors = found.shortened(body.dimensions)

    def written() -> Response:  # millions of numbers
        took = {"total_duration": int(found.seconds * 1e9), "load_duration": int(found.load_seconds * 1e9)}
        return JSONResponse({"model": body.model, "embeddings": vectors.tolist(), **took, "prompt_eval_count": found.tokens})

    return await asyncio.to_thread(written)


@router.post("/embeddings")
async def embeddings(body: Embeddings, request: Request) -> Json:
    """The vector of one text."""
    server, keep = server_of(request), stays(body.keep_alive)
    server.models.full_name(body.model)
    if not body.prompt:
        return {"embedding": []}
    found = await server.embed(request, body.model, [body.prompt], keep, body.options.num_ctx)
    return {"embedding": found.vectors[0].tolist()}
