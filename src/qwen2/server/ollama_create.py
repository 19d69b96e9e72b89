"""Ollama's dialect: models that clients make out of others, and the files that they upload for them.

A server reads no path that a client names: FROM is a model's name here, files come through /api/blobs.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.requests import ClientDisconnect

from qwen2.server.errors import GONE, ApiError
from qwen2.server.openai import server_of
from qwen2.server.openai_schema import Body
from qwen2.server.progress import respond, without
from qwen2.weights.blobs import Blobs, parse_digest
from qwen2.weights.mixes import mix_named
from qwen2.weights.modelfile import LARGEST, Modelfile, parse
from qwen2.weights.own_adapter import GGUF

if TYPE_CHECKING:
    from qwen2.server.app import Server
    from qwen2.weights.manifest import StoredModel
    from qwen2.weights.pull import Progress

router = APIRouter(prefix="/api")
Json = dict[str, Any]
PIECE = 1 << 20  # bytes written at once
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Said(Body):
    """A message that a model begins every conversation with."""

    role: Literal["system", "user", "assistant"]
    content: str


class Create(Body):
    """POST /api/create. `name` is what `model` was called, `modelfile` how all of it was said, before."""

    model: str | None = None
    name: str | None = None
    from_: str | None = Field(default=None, alias="from")
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    template: str | None = None
    license: str | list[str] | None = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    messages: list[Said] | None = None
    requires: str | None = None
    modelfile: str | None = Field(default=None, max_length=LARGEST)
    quantize: str | None = None
    stream: bool = True

    @property
    def target(self) -> str:
        """The new model's name."""
        given = [name for name in (self.model, self.name) if name is not None]
        if not given or len(set(given)) > 1:
            raise ApiError(400, "create: say the new model's name as model", field="model")
        return given[0]

    def parsed(self) -> tuple[Modelfile, dict[str, str], dict[str, str]]:
        """What the model shall be, and the files, digests by name, that it and its adapter are made of where they are made of files."""
        parts = {
            "template": self.template,
            "system": self.system,
            "parameters": self.parameters,
            "messages": None if self.messages is None else [(one.role, one.content) for one in self.messages],
            "licence": self.license,
            "requires": self.requires,
        }
        given = {key: value for key, value in parts.items() if value is not None}
        files, adapters = ({name: parse_digest(digest) for name, digest in (given or {}).items()} for given in (self.files, self.adapters))
        if self.modelfile is not None:
            if given or files or self.from_ is not None:
                raise ApiError(400, "modelfile says it all: leave from, files and the like out, or modelfile", field="modelfile")
            modelfile, model, adapter = _from_text(self.modelfile)
            return modelfile, model, adapter or adapters
        if (self.from_ is None) == (not files):
            raise ApiError(400, "create: say from, a model's name, or files, one of them", field="from")
        return Modelfile.from_json({**given, "source": self.from_ or ""}), files, adapters


def _from_text(text: str) -> tuple[Modelfile, dict[str, str], dict[str, str]]:
    """A Modelfile as text; @sha256:... in FROM and ADAPTER is a GGUF file that was uploaded."""
    try:
        modelfile = parse(text)
        adapter = {}
        if modelfile.adapter is not None:
            if not modelfile.adapter.startswith("@"):
                raise ValueError("ADAPTER: no server reads what a client names: upload files and say adapters, or @sha256:... of a .gguf")
            adapter = {GGUF: parse_digest(modelfile.adapter[1:])}
            modelfile = replace(modelfile, adapter=None)
        if modelfile.source.startswith("@"):
            return modelfile, {"model.gguf": parse_digest(modelfile.source[1:])}, adapter
    except ValueError as error:
        raise ApiError(400, f"modelfile: {error}", field="modelfile") from None
    return modelfile, {}, adapter


@router.post("/create")
async def create(body: Create, request: Request) -> Response:
    """Make a model, in place of one of that name that may be there."""
    server = server_of(request)
    modelfile, files, adapter = body.parsed()
    target = str(server.models.store.own_name(body.target))
    if not files and server.models.store.is_path(modelfile.source):
        raise ApiError(400, f"from {modelfile.source!r} is no model's name; files of yours are uploaded, POST /api/blobs", field="from")
    stops = modelfile.parameters.get("stop", ())
    server.check_stops([str(stop) for stop in stops] if isinstance(stops, tuple) else [str(stops)])  # each request will look for them
    mix = None if body.quantize is None else mix_named(body.quantize)
    return await respond(request, creating(server, target, modelfile, files, mix, adapter), body.stream)


async def creating(
    server: Server, target: str, modelfile: Modelfile, files: dict[str, str], mix: str | None, adapter: dict[str, str]
) -> AsyncGenerator[Json, None]:
    """Its progress; paths of this machine are none of the client's business."""
    store = server.models.store

    def line(progress: Progress) -> Json:
        if progress.note:
            return {"status": progress.note}
        return {"status": "writing weights", "total": progress.total, "completed": progress.done}

    def make(watch: Callable[[Progress], None]) -> StoredModel:
        return store.create(target, modelfile, files, mix, watch, adapter=adapter)

    async with aclosing(server.works.told("made", target, make, line)) as lines:
        async for one in lines:
            yield {key: without(value, str(store.home)) if isinstance(value, str) else value for key, value in one.items()}


# --- files


@router.head("/blobs/{digest}")
async def has_blob(digest: str, request: Request) -> Response:
    """Whether the file of that digest is here."""
    found = await asyncio.to_thread(server_of(request).models.store.blob, parse_digest(digest))
    return Response(status_code=404 if found is None else 200)


@router.post("/blobs/{digest}")
async def upload(digest: str, request: Request) -> Response:
    """A file: written to the disk as it comes, and there when all of it is, and is what its digest says."""
    store = server_of(request).models.store
    wanted = parse_digest(digest)
    if await asyncio.to_thread(store.blob, wanted) is not None:
        async for _ in request.stream():  # a client that is still sending would take a closed connection for an error
            pass
        return Response(status_code=200)
    length = request.headers.get("content-length", "")
    try:
        coming = await asyncio.to_thread(Blobs(store.home).upload, wanted, int(length) if length.isdecimal() else None)
        try:
            piece = bytearray()
            async for data in request.stream():
                piece += data
                if len(piece) >= PIECE:
                    await asyncio.to_thread(coming.append, bytes(piece))
                    piece.clear()
            await asyncio.to_thread(coming.finish, bytes(piece))
        finally:
            coming.close()
    except ClientDisconnect:
        raise ApiError(GONE, "the client has gone") from None
    except OSError as error:
        full = error.errno in DISK_FULL or error.errno is None
        raise ApiError(507 if full else 500, "the disk is full" if error.errno in DISK_FULL else str(error.strerror or error)) from None
    return Response(status_code=201)
