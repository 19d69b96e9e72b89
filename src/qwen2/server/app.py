"""The application: routes of all dialects, errors in each one's shape, and what they share.

uvicorn.run(create_app(Settings()), host="127.0.0.1", port=11434)          # what `qwen2 serve` does
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from qwen2 import __version__
from qwen2.engine.memory import free_memory
from qwen2.server import anthropic, completions, native, ollama, ollama_create, ollama_models, openai, responses
from qwen2.server.answering import Answering, unless_gone
from qwen2.server.characters import whole_characters
from qwen2.server.errors import FAILURES, GONE, ApiError, body, of_engine
from qwen2.server.guard import Guard, dialect_of
from qwen2.server.health import Readiness, health
from qwen2.server.loading import Loader
from qwen2.server.metrics import Metrics
from qwen2.server.models import UNSAID, Load, Models
from qwen2.server.openapi import document
from qwen2.server.page import add_page
from qwen2.server.progress import Works
from qwen2.server.settings import Settings
from qwen2.server.streams import Streams, check_whole, room
from qwen2.server.trials import Trials
from qwen2.weights.blobs import Blobs
from qwen2.weights.store import Store

if TYPE_CHECKING:
    from qwen2.engine.asked import Asked
    from qwen2.engine.llm import LLM
    from qwen2.engine.request import Request as EngineRequest
    from qwen2.server.openai_schema import Sampling

log = logging.getLogger("qwen2.server")


class Embedded(NamedTuple):
    """Vectors (n, D), tokens read, the model's full name, and seconds: until the model was there, and all."""

    vectors: torch.Tensor
    tokens: int
    name: str
    load_seconds: float
    seconds: float

    def shortened(self, dimensions: int | None) -> torch.Tensor:
        """The vectors, or of each the first numbers, made one of length one again."""
        if dimensions is None:
            return self.vectors
        if dimensions > self.vectors.shape[1]:
            raise ApiError(400, f"dimensions is {dimensions}: this model's vectors have {self.vectors.shape[1]}", field="dimensions")
        return torch.nn.functional.normalize(self.vectors[:, :dimensions], dim=1)


class Server:
    """What all routes use."""

    def __init__(self, settings: Settings, store: Store, load: Load) -> None:
        self.settings = settings
        self.models = Models(store, load, settings.keep_alive, settings.max_loaded, partial(free_memory, settings.device))
        self.metrics = Metrics(self.models)
        self.readiness = Readiness(self)
        self.works, self.trials = Works(), Trials()
        self.streams: Streams
        self.answers = 0  # that are written or wait: a request may ask for many
        self.ended_by_id: dict[str, Callable[[], None]] = {}  # answers that their client can end (native.py)

    def check(self, asked: Sampling) -> None:
        """The limits that hold before a model is loaded."""
        self.models.full_name(asked.model)
        limits = self.settings.limits
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options goes with stream: true", field="stream_options")
        if asked.stream and asked.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs goes with stream: false", field="prompt_logprobs")
        if asked.n is not None and asked.n > limits.samples:
            raise ApiError(400, f"n is {asked.n}: this server writes at most {limits.samples} samples of one request", field="n")
        if asked.priority and not self.settings.priorities:
            told = "this server takes requests as they come, unless it is started with --priorities; leave it out"
            raise ApiError(400, f"priority is {asked.priority}: {told}", field="priority")
        self.check_stops(asked.stops)

    def check_stops(self, stops: Sequence[str]) -> None:
        """Few and short enough to be looked for at every token."""
        limits = self.settings.limits
        if len(stops) > limits.stops or any(len(stop) > limits.stop_characters for stop in stops):
            raise ApiError(400, f"stop: at most {limits.stops} texts of at most {limits.stop_characters} characters", field="stop")

    def check_messages(self, messages: Sequence[object], field: str = "messages") -> None:
        """Few enough to be read one by one."""
        most = self.settings.limits.messages
        if len(messages) > most:
            raise ApiError(400, f"{field} has {len(messages):,} entries: this server reads at most {most:,} of one request", field=field)

    @contextmanager
    def queued(self, answers: int) -> Iterator[None]:
        """Count a request's answers, its prompts times their samples, among all. ApiError where they are too many."""
        most = self.settings.limits.queue
        if answers > most:
            raise ApiError(400, f"this asks for {answers:,} answers, prompts times n, and this server takes {most:,} at once: send fewer")
        if self.answers + answers > most:
            told = f"{self.answers:,} answers run or wait already, and with {answers:,} more they are over {most:,}: ask again"
            raise ApiError(429, told, "queue_full", retry_after=2)
        self.answers += answers
        try:
            yield
        finally:
            self.answers -= answers

    @asynccontextmanager
    async def model(self, request: Request, name: str, keep_alive: object = UNSAID, answers: int = 0) -> AsyncIterator[LLM]:
        """A model, held; waited for as long as its client is there, so that none is loaded, and no other given up, for nobody.

        So many `answers`, of the model's full name, are counted where the client goes before.
        """
        async with AsyncExitStack() as held:
            try:
                llm = await unless_gone(request, held.enter_async_context(self.models.use(name, keep_alive)))
            except ApiError as error:
                if error.status == GONE and answers:
                    self.metrics.left(name, answers)
                raise
            yield llm

    async def answer(
        self, request: Request, name: str, ask: Callable[[LLM], Sequence[Asked]], keep_alive: object = UNSAID, answers: int = 1
    ) -> Answering:
        """Load the model where it is not, check what is asked against it, and begin; so many `answers` are asked for. Raises ApiError."""
        async with AsyncExitStack() as held:
            held.enter_context(self.queued(answers))
            full = self.models.full_name(name)
            start = time.perf_counter()
            llm = await held.enter_async_context(self.model(request, full, keep_alive, answers))
            loaded = time.perf_counter()
            asked = await self.trials.ask(request, llm, ask)
            return Answering(full, llm, asked, self.streams, self.metrics, held.pop_all(), start, loaded - start)
        raise AssertionError("the stack swallows nothing")

    async def embed(
        self, request: Request, name: str, texts: Sequence[Any], keep_alive: object = UNSAID, most: int | None = None, cut: bool = False
    ) -> Embedded:
        """`most`: tokens that a text may have; `cut`: of longer ones the first. Each text counts as an answer, in the queue too.

        A request of more texts than the queue has places takes all of them: clients send thousands at once, of which few run.
        """
        start, full, limits = time.perf_counter(), self.models.full_name(name), self.settings.limits
        if len(texts) > limits.inputs:
            raise ApiError(400, f"input has {len(texts):,} texts: 1 to {limits.inputs:,} at once", field="input")
        with self.queued(min(len(texts), limits.queue)):
            async with self.model(request, full, keep_alive, len(texts)) as llm:
                loaded = time.perf_counter()
                limit = llm.window if most is None else min(most, llm.window)

                def asked() -> tuple[list[EngineRequest], Callable[[], torch.Tensor]]:
                    return llm.embedding_requests([llm.tokenizer.encode(text)[:limit] if cut and text else text for text in texts])

                reads, vectors = await asyncio.to_thread(asked)
                longest = max(len(one.prompt) for one in reads)
                if most is not None and longest > most:
                    raise ApiError(400, f"a text has {longest:,} tokens and num_ctx is {most:,}: raise it, or shorten the text")
                await self._read(request, full, llm, reads)
                tokens, found = sum(len(one.prompt) for one in reads), await asyncio.to_thread(vectors)
                return Embedded(found, tokens, full, loaded - start, time.perf_counter() - start)
        raise AssertionError("the contexts swallow nothing")

    async def _read(self, request: Request, full: str, llm: LLM, reads: Sequence[EngineRequest]) -> None:
        """Have all texts read, and count how that ended."""
        places, left, reason = room(llm), len(reads), "gone"

        async def read(one: EngineRequest) -> None:
            nonlocal left
            async with places:
                async for chunk in self.streams.requests(llm, one):
                    check_whole(one, chunk)
            self.metrics.embedded(full, one)
            left -= 1

        reading = [asyncio.ensure_future(read(one)) for one in reads]
        try:
            await unless_gone(request, asyncio.gather(*reading))
        except (*FAILURES, ApiError) as error:
            reason = "gone" if isinstance(error, ApiError) and error.status == GONE else "error"
            raise
        finally:  # where one failed the others are for nobody
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
            if left:
                self.metrics.left(full, left, reason=reason)


def create_app(settings: Settings, store: Store | None = None, load: Load | None = None) -> FastAPI:
    """The server as an ASGI application."""
    store = Store() if store is None else store
    server = Server(settings, store, Loader(settings, store) if load is None else load)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        server.streams = Streams(asyncio.get_running_loop())
        await asyncio.to_thread(Blobs(store.home).sweep)
        working = [asyncio.ensure_future(server.models.expire()), asyncio.ensure_future(server.readiness.warm())]
        yield
        server.works.end()
        for one in working:
            one.cancel()
        for name in list(server.models.loaded):
            server.models.unload(name)

    whole = [Depends(whole_characters)]
    app = FastAPI(title="qwen2", version=__version__, lifespan=life, docs_url=None, redoc_url=None, dependencies=whole)
    app.state.server = server
    for dialect in (openai, completions, responses, anthropic, ollama, ollama_models, ollama_create, native):
        app.include_router(dialect.router)
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"])
    add_page(app)
    for kind, handler in (
        (ApiError, on_api_error),
        *((failure, on_api_error) for failure in FAILURES),
        (RequestValidationError, on_unreadable),
        (HTTPException, on_http_error),
    ):
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]
    app.add_middleware(Guard, settings=settings, responses=server.metrics.responses)
    app.openapi = cache(partial(document, app, settings.api_key is not None))  # type: ignore[method-assign]
    return app


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    server: Server = request.app.state.server
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")


# --- errors


def answer_error(request: Request, error: ApiError) -> JSONResponse:
    """In the dialect of the path."""
    return JSONResponse(body(error, dialect_of(request.url.path)), status_code=error.status, headers=error.headers)


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """A refusal of ours, or of the engine's."""
    return answer_error(request, of_engine(error))


async def on_unreadable(request: Request, error: RequestValidationError) -> JSONResponse:
    """A body that is not what the route takes: the first thing that is wrong with it."""
    first = error.errors()[0]
    told = first["msg"].removeprefix("Value error, ")  # pydantic's word for what is ours
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        names = ", ".join(".".join(str(part) for part in one["loc"][1:]) for one in error.errors() if one["type"] == "extra_forbidden")
        return answer_error(request, ApiError(400, f"unknown field {names}: this server would have to ignore it", "unknown_field", place))
    if first["type"] == "json_invalid":
        return answer_error(
            request, ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}", "invalid_json")
        )
    if not place:
        told = "the body is empty: send a JSON object" if first["type"] == "missing" else f"the body: {told}"
        return answer_error(request, ApiError(400, told, "invalid_json"))
    return answer_error(request, ApiError(400, f"{place}: {told}", "invalid_field", place))


async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """No such path, or not that way."""
    answered = answer_error(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
    if error.status_code == 405:
        answered.headers["Allow"] = ", ".join(sorted(_methods(request)))
    return answered


def _methods(request: Request) -> set[str]:
    """Those that a path has: a route of its own for each, of which the framework names the first."""
    routes = (one for one in request.app.routes if one.matches(request.scope)[0] != Match.NONE)
    return {method for one in routes for method in getattr(one, "methods", None) or ()}
