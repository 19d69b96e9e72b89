"""Ollama's dialect: chat and generate as lines of JSON, embeddings, and the models of this machine.

Durations are nanoseconds. `num_ctx` bounds prompt and answer of one request; no weights are loaded anew for it, since the cache grows
with use. A prompt is never cut: one that does not fit is refused with both counts.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from qwen2 import __version__
from qwen2.server.answering import Answering, EventsResponse, events, unless_gone
from qwen2.server.errors import ApiError, of_engine
from qwen2.server.models import UNSAID
from qwen2.server.ollama_schema import Asking, Chat, Copy, Delete, Embed, Embeddings, Generate, Pull, Show
from qwen2.server.openai import server_of
from qwen2.server.settings import seconds

if TYPE_CHECKING:
    from qwen2.engine.asked import Asked
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Output, TokenLogprob
    from qwen2.server.app import Server
    from qwen2.weights.manifest import StoredModel
    from qwen2.weights.pull import Progress

router = APIRouter(prefix="/api")
Json = dict[str, Any]
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


# --- answers


@router.post("/chat")
async def chat(body: Chat, request: Request) -> Response:
    """A conversation's next message."""
    if not body.messages:
        return await only_load(body, request, {"message": {"role": "assistant", "content": ""}})

    def ask(llm: LLM) -> list[Asked]:
        return [bounded(llm.ask([_message(one) for one in body.messages], body.options.params(body.likeliest), body.tools), body)]

    answering = await server_of(request).answer(request, body.model, ask, stays(body.keep_alive))
    return await respond(request, body, answering, ChatLines(body.model, answering))


@router.post("/generate")
async def generate(body: Generate, request: Request) -> Response:
    """What goes on from a prompt: as a question in the model's template, raw, or between a prompt and a suffix."""
    if not body.prompt and not body.suffix:
        return await only_load(body, request, {"response": ""})

    def ask(llm: LLM) -> list[Asked]:
        return [bounded(llm.ask(prompt_ids(llm, body), body.options.params(body.likeliest)), body)]

    answering = await server_of(request).answer(request, body.model, ask, stays(body.keep_alive))
    return await respond(request, body, answering, GenerateLines(body.model, answering, with_context=not (body.raw or body.suffix)))


def _message(message: Json) -> Json:
    """Ollama's message as OpenAI shapes it: a tool's result has its name as `tool_name`, calls have arguments as objects."""
    known = {key: value for key, value in message.items() if key not in ("tool_name", "images", "thinking")}
    if message.get("images"):
        raise ApiError(400, "messages: images are given, and these models read text only")
    if message.get("tool_name") is not None:
        known["name"] = message["tool_name"]
    return known


def bounded(asked: Asked, body: Asking) -> Asked:
    """num_ctx as a bound on this request alone."""
    context, request = body.options.num_ctx, asked.request
    if context is not None:
        room = context - len(request.prompt)
        if room < 1:
            raise ApiError(
                400, f"the prompt has {len(request.prompt):,} tokens and num_ctx is {context:,}: raise it, or shorten the prompt"
            )
        assert request.params.max_tokens is not None, "the window bounds every answer"
        request.params = replace(request.params, max_tokens=min(room, request.params.max_tokens))
    return asked


def prompt_ids(llm: LLM, body: Generate) -> list[int]:
    """The ids that the model goes on from."""
    if body.suffix:
        return _fill_in(llm, body)
    if body.raw:
        if body.system is not None or body.context is not None:
            raise ApiError(400, "raw takes the prompt as it is: leave system and context out")
        return list(llm.tokenizer.encode_trusted(body.prompt))
    system = [] if body.system is None else [{"role": "system", "content": body.system}]
    question = {"role": "user", "content": body.prompt}
    if body.context is None:
        return list(llm.template.render([*system, question], add_generation_prompt=True).ids)
    llm.engine.check_ids("context", body.context)
    before: list[Any] = [*system, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    known = llm.template.render(before).ids
    whole = llm.template.render([*before, question], add_generation_prompt=True).ids
    ends = [place for place, token in enumerate(known) if token in llm.engine.eos]
    end = ends[-1] + 1 if ends and body.context[-1] in llm.engine.eos else len(known)
    return [*body.context, *whole[end:]]


def _fill_in(llm: LLM, body: Generate) -> list[int]:
    """Qwen2.5-Coder technical report, section 3.2.1: prefix, suffix, and then the middle is the model's."""
    control, encode = llm.tokenizer.control, llm.tokenizer.encode
    if any(name not in control for name in FIM):
        raise ApiError(400, "suffix: this model has no tokens for filling in the middle")
    if body.raw or body.system is not None or body.context is not None:
        raise ApiError(400, "suffix goes with a prompt alone: leave raw, system and context out")
    first, second, third = (control[name] for name in FIM)
    return [first, *encode(body.prompt), second, *encode(body.suffix), third]


def stays(keep_alive: float | str | None) -> object:
    """How long the model stays after this request: UNSAID, seconds, or None for good."""
    if keep_alive is None:
        return UNSAID
    if isinstance(keep_alive, str):
        return seconds(keep_alive)
    return None if keep_alive < 0 else float(keep_alive)


async def only_load(body: Asking, request: Request, empty: Json) -> Response:
    """Without anything to answer a model is loaded, or, where it shall stay no longer, unloaded."""
    server = server_of(request)
    full = server.models.full_name(body.model)
    if stays(body.keep_alive) == 0:
        if full in server.models.loaded:
            server.models.unload(full)
        reason = "unload"
    else:
        async with server.models.use(full, stays(body.keep_alive)):
            reason = "load"
    return JSONResponse({"model": body.model, "created_at": now(), **empty, "done": True, "done_reason": reason})


async def respond(request: Request, body: Asking, answering: Answering, lines: Lines) -> Response:
    """Lines as they come, or one for all."""
    if body.stream:
        return EventsResponse(answering, events(lines.stream(), "ollama", b""), "ollama")
    try:
        return JSONResponse(await unless_gone(request, lines.whole()))
    except (ValueError, ArithmeticError, MemoryError) as error:
        raise of_engine(error) from error
    finally:
        await answering.close()


class Lines:
    """One answer as Ollama's objects. `piece` and `empty` say how a text is shown."""

    def __init__(self, model: str, answering: Answering) -> None:
        self.model, self.answering, self.llm = model, answering, answering.llm

    def head(self) -> Json:
        """What every object begins with."""
        return {"model": self.model, "created_at": now()}

    def text(self, text: str) -> Json:
        """A text as this kind of answer holds it."""
        raise NotImplementedError

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

    def folded(self, before: Json, new: Json) -> Json:
        """Two objects as one."""
        raise NotImplementedError

    def _end(self, output: Output) -> Json:
        usage, timings = output.usage, output.timings
        reason = {"length": "length"}.get(output.finish_reason, "stop")
        prompt, decode = int(timings.prompt_seconds * 1e9), int(timings.decode_seconds * 1e9)
        return {
            "done": True,
            "done_reason": reason,
            "total_duration": prompt + decode + int(self.answering.load_seconds * 1e9),
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
async def embed(body: Embed, request: Request) -> Json:
    """Vectors of several texts. A text that does not fit is refused, not cut, unless `truncate` says otherwise."""
    if body.truncate:
        raise ApiError(400, "truncate: texts are not cut here; shorten them, or read them in parts")
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts:
        return {"model": body.model, "embeddings": []}
    vectors, tokens, _ = await server_of(request).embed(request, body.model, texts, stays(body.keep_alive))
    return {"model": body.model, "embeddings": vectors.tolist(), "prompt_eval_count": tokens}


@router.post("/embeddings")
async def embeddings(body: Embeddings, request: Request) -> Json:
    """The vector of one text."""
    if not body.prompt:
        return {"embedding": []}
    vectors, _, _ = await server_of(request).embed(request, body.model, [body.prompt], stays(body.keep_alive))
    return {"embedding": vectors[0].tolist()}


# --- models


@router.get("/version")
async def version() -> Json:
    """Ours."""
    return {"version": __version__}


@router.get("/tags")
async def tags(request: Request) -> Json:
    """The models that are here."""
    stored = await asyncio.to_thread(server_of(request).models.store.list)
    return {"models": [_listed(one) for one in stored if one.path.exists()]}


def _listed(stored: StoredModel) -> Json:
    return {"name": stored.name, "model": stored.name, "modified_at": stored.pulled, "size": stored.size, "digest": stored.digest} | {
        "details": {"format": "gguf" if stored.path.suffix == ".gguf" else "safetensors", "family": stored.name.split(":")[0]}
        | {"parameter_size": "", "quantization_level": stored.format}
    }


@router.get("/ps")
async def running(request: Request) -> Json:
    """Those in memory: where, how large, how long they stay."""
    server = server_of(request)
    found = []
    for one in server.models.loaded.values():
        llm, stored = one.llm, server.models.store.get(one.name)
        cache = llm.engine.cache
        size = llm.model.network.weight_bytes() + cache.nbytes
        on_gpu = llm.model.device.type != "cpu"
        expires = None if one.expires is None else datetime.fromtimestamp(one.expires_at(), timezone.utc).isoformat()
        found.append(
            _listed(stored)
            | {"size": size, "size_vram": size if on_gpu else 0, "expires_at": expires, "context_length": llm.window}
            | {"device": str(llm.model.device), "cache_bytes": cache.nbytes, "load_seconds": round(one.seconds, 3)}
        )
    return {"models": found}


@router.post("/show")
async def show(body: Show, request: Request) -> Json:
    """What a model is."""
    models = server_of(request).models
    full = models.full_name(body.model)
    return await asyncio.to_thread(_shown, models.store.get(full))


def _shown(stored: StoredModel) -> Json:
    from qwen2.tokenizer import ChatTemplate
    from qwen2.weights.describe import describe

    described = describe(stored.path)
    config, arch = described.config, described.architecture
    template = ChatTemplate.of(described.tokenizer)
    defaults = {name: getattr(described.generation, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    lines = [f"{name:30} {value!r}" for name, value in defaults.items() if value is not None]
    lines += [f"{'stop':30} {text!r}" for text, token in described.tokenizer.control.items() if token in described.generation.eos]
    capabilities = ["completion", "embedding", "tools"] + (["insert"] if all(name in described.tokenizer.control for name in FIM) else [])
    return {
        "license": stored.licence,
        "modelfile": f"FROM {stored.name}\n",
        "parameters": "\n".join(lines),
        "template": template.jinja,
        "details": _listed(stored)["details"] | {"parameter_size": f"{config.parameters() / 1e9:.1f}B", "families": [arch]},
        "model_info": {
            "general.architecture": arch,
            "general.parameter_count": config.parameters(),
            f"{arch}.context_length": config.window,
            f"{arch}.embedding_length": config.hidden,
            f"{arch}.block_count": config.layers,
            f"{arch}.feed_forward_length": config.ffn,
            f"{arch}.attention.head_count": config.heads,
            f"{arch}.attention.head_count_kv": config.kv_heads,
            f"{arch}.rope.freq_base": config.rope_theta,
        },
        "capabilities": capabilities,
        "modified_at": stored.pulled,
    }


@router.post("/copy")
async def copy(body: Copy, request: Request) -> Response:
    """A second name; no bytes are copied."""
    models = server_of(request).models
    full = models.full_name(body.source)
    await asyncio.to_thread(models.store.copy, full, body.destination)
    return Response(status_code=200)


@router.delete("/delete")
async def delete(body: Delete, request: Request) -> Response:
    """A model goes from the disk; one that answers somebody stays."""
    models = server_of(request).models
    full = models.full_name(body.model)
    loaded = models.loaded.get(full)
    if loaded is not None and loaded.users:
        raise ApiError(409, f"{full} is answering somebody: try again when it has ended")
    if loaded is not None:
        del loaded
        models.unload(full)
    try:
        await asyncio.to_thread(models.store.remove, full)
    except OSError as error:
        raise ApiError(409, str(error)) from None
    return Response(status_code=200)


class LeftError(Exception):
    """The client has gone: the pull ends, and what came so far stays for the next one."""


@router.post("/pull")
async def pull(body: Pull, request: Request) -> Response:
    """Fetch a model, with progress."""
    lines = pulling(server_of(request), body.model)
    if body.stream:
        return StreamingResponse(lines, media_type="application/x-ndjson")
    last = {}
    async for line in lines:
        last = json.loads(line)
    if "error" in last:
        raise ApiError(400, last["error"])
    return JSONResponse(last)


async def pulling(server: Server, name: str) -> AsyncIterator[bytes]:
    """A pull's progress as lines; it only grows. Leaving the loop stops it, and the next one goes on from there."""
    loop, queue, left = asyncio.get_running_loop(), asyncio.Queue[Json | None](), threading.Event()

    def watch(progress: Progress) -> None:
        if left.is_set():
            raise LeftError
        line = (
            {"status": progress.note}
            if progress.note
            else {"status": f"pulling {name}", "digest": name, "total": progress.total, "completed": progress.done}
        )
        loop.call_soon_threadsafe(queue.put_nowait, line)

    def work() -> None:
        try:
            server.models.store.pull(name, watch)
            last: Json | None = {"status": "success"}
        except (ValueError, OSError) as error:
            last = {"error": str(error)}
        except LeftError:
            last = None
        loop.call_soon_threadsafe(queue.put_nowait, last)

    yield json.dumps({"status": "pulling manifest"}).encode() + b"\n"
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        while (line := await queue.get()) is not None:
            yield json.dumps(line).encode() + b"\n"
            if "error" in line or line.get("status") == "success":
                break
    finally:
        left.set()
        await asyncio.shield(working)
