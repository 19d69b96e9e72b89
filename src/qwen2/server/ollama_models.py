"""Ollama's dialect: which models are here and in memory, what they are, and how they come and go."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from qwen2 import __version__
from qwen2.engine.about import about
from qwen2.server.errors import ApiError
from qwen2.server.ollama_schema import Copy, Delete, Pull, Show
from qwen2.server.openai import server_of
from qwen2.server.progress import respond, without
from qwen2.weights.modelfile import Modelfile, spelled
from qwen2.weights.parameters import shown_parameters
from qwen2.weights.registry import ENTRIES, by_repository

if TYPE_CHECKING:
    from qwen2.server.app import Server
    from qwen2.weights.manifest import StoredModel
    from qwen2.weights.parameters import Value
    from qwen2.weights.pull import Progress

router = APIRouter(prefix="/api")
log = logging.getLogger("qwen2.server")
Json = dict[str, Any]
OLLAMA = "0.12.11"  # whose API is kept to: the newest whose documented fields are known here; clients refuse servers that are too old
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@router.get("/version")
async def version() -> Json:
    """Ollama's, whose API this is, since clients look whether it is new enough for them; and ours."""
    return {"version": OLLAMA, "qwen2": __version__}


@router.head("/version", include_in_schema=False)
async def has_version() -> Response:
    """Clients look whether somebody is there."""
    return Response()


@router.get("/tags")
async def tags(request: Request) -> Json:
    """The models that are here."""
    store = server_of(request).models.store
    return {"models": await asyncio.to_thread(lambda: [_listed(one) for one in store.list() if one.path.exists()])}


@router.head("/tags", include_in_schema=False)
async def has_tags() -> Response:
    """Clients look whether somebody is there."""
    return Response()


def _listed(stored: StoredModel) -> Json:
    family, size, form = _outlined(stored.path, stored.digest)
    details = {"format": "gguf" if stored.path.suffix == ".gguf" else "safetensors", "family": family, "families": [family]}
    details |= {"parameter_size": size, "quantization_level": form, "parent_model": stored.made.source}
    head = {"name": stored.name, "model": stored.name, "modified_at": stored.pulled, "size": stored.size, "digest": stored.digest}
    return head | {"details": details}


@lru_cache(maxsize=1024)
def _outlined(path: Path, digest: str) -> tuple[str, str, str]:
    """Architecture, number of weights and their types; of files that cannot be read nothing. `digest`: of what lies there."""
    from qwen2.weights.describe import outline

    try:
        found = outline(path)
    except (ValueError, OSError) as error:  # one of them shall not hide the others
        log.warning("%s cannot be read: %s", path, error)
        return "", "", ""
    return found.architecture, counted(found.config.parameters()), found.form


def counted(weights: int) -> str:
    """494.03M, 1.5B, 7B."""
    for unit, one, digits in (("B", 10**9, 1), ("M", 10**6, 2), ("K", 10**3, 0)):
        if weights >= one:
            return f"{weights / one:.{0 if weights % one == 0 else digits}f}{unit}"
    return str(weights)


@router.get("/ps")
async def running(request: Request) -> Json:
    """Those in memory: where, how large, how long they stay."""
    server = server_of(request)
    found = []
    for one in list(server.models.loaded.values()):
        llm, shares = one.llm, server.models.sharing(one)  # whose memory is this one's too
        cache = llm.engine.cache_bytes
        size = llm.engine.weight_bytes + cache  # the draft's too
        on_gpu = llm.model.device.type != "cpu"
        expires = None if one.expires is None else datetime.fromtimestamp(one.expires_at(), timezone.utc).isoformat()
        found.append(
            await asyncio.to_thread(_listed, one.stored)
            | {"size": size, "size_vram": size if on_gpu else 0, "expires_at": expires, "context_length": about(llm).window}
            | {"in_use": one.users > 0, "device": str(llm.model.device), "cache_bytes": cache, "load_seconds": round(one.seconds, 3)}
            | {"shares": shares}
        )
    return {"models": found}


@router.post("/show")
async def show(body: Show, request: Request) -> Json:
    """What a model is."""
    models = server_of(request).models
    full = models.full_name(body.target)
    return await asyncio.to_thread(_shown, models.store.get(full))


def _shown(stored: StoredModel) -> Json:
    made = stored.made
    said = json.dumps({key: value for key, value in made.to_json().items() if key in ("template", "parameters")})
    found = _read(stored.path, stored.digest, _stamp(stored.path), said, stored.adapter_path)
    return found | {
        "license": "\n".join(made.licence) or stored.licence,
        "modelfile": made.text(stored.name, *(["With an adapter of its own, which FROM has."] if stored.adapter else [])),
        "system": found["system"] if made.system is None else made.system,
        "messages": [{"role": role, "content": content} for role, content in made.messages],
        "details": _listed(stored)["details"],
        "modified_at": stored.pulled,
    }


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes with the files at a path: names, sizes, dates in nanoseconds."""
    files = [path] if path.is_file() else sorted(one for one in path.glob("*") if one.is_file())
    return tuple((one.name, stat.st_size, stat.st_mtime_ns) for one in files for stat in [one.stat()])


@lru_cache(maxsize=256)
def _read(path: Path, digest: str, stamp: object, said: str, adapter: Path | None) -> Json:
    """What is shown of files whose digest and stamp these are, and of what a Modelfile says beside them.

    Kept, since it takes a tokenizer, which is a second of Python in which nobody's answer goes on.
    """
    from qwen2.tokenizer import ChatTemplate
    from qwen2.weights.describe import describe

    described, made = describe(path, adapter), Modelfile.from_json(json.loads(said))
    config, arch = described.config, described.architecture
    template = ChatTemplate.of(described.tokenizer, source=made.template)
    parameters = shown_parameters(made.defaults(described.generation))
    ends = tuple(text for text, token in described.tokenizer.control.items() if token in described.generation.eos)
    capabilities = ["completion", "embedding"] + (["tools"] if template.takes_tools else [])
    capabilities += ["insert"] if all(name in described.tokenizer.control for name in FIM) else []
    return {
        "parameters": "\n".join(_lines({**parameters, "stop": (*ends, *made.defaults(described.generation).stop)})),
        "template": template.jinja,
        "system": template.default_system,
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
    }


def _lines(parameters: Mapping[str, Value]) -> list[str]:
    return [f"{name:30} {spelled(one)}" for name, value in parameters.items() for one in (value if isinstance(value, tuple) else (value,))]


@router.post("/copy")
async def copy(body: Copy, request: Request) -> Response:
    """A second name; no bytes are copied."""
    server = server_of(request)
    full, store = server.models.full_name(body.source), server.models.store
    own = str(store.own_name(body.destination))
    copying = server.works.told("copied", own, lambda watch: store.copy(full, own, watch), lambda progress: {"status": progress.note})
    try:
        await respond(request, copying, stream=False)
    except ApiError as error:
        raise ApiError(error.status, without(error.message, str(store.home))) from None
    return Response(status_code=200)


@router.delete("/delete")
async def delete(body: Delete, request: Request) -> Response:
    """A model goes from the disk; one that answers somebody stays."""
    models = server_of(request).models
    full = models.full_name(body.target)
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


@router.post("/pull")
async def pull(body: Pull, request: Request) -> Response:
    """Fetch a model, with progress."""
    name = body.target
    known = name in ENTRIES or ("/" in name and by_repository(name) is not None)
    return await respond(request, pulling(server_of(request), name), body.stream, 503 if known else 404)


async def pulling(server: Server, name: str) -> AsyncGenerator[Json, None]:
    """A pull's progress, which only grows; the next pull goes on where a client has left one."""

    def line(progress: Progress) -> Json:
        if progress.note:
            return {"status": progress.note}
        return {"status": f"pulling {name}", "digest": name, "total": progress.total, "completed": progress.done}

    yield {"status": "pulling manifest"}
    async with aclosing(server.works.told("pulled", name, lambda watch: server.models.store.pull(name, watch), line)) as lines:
        async for one in lines:
            yield one
