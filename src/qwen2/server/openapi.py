"""The server's own specification, /openapi.json: what FastAPI reads off the routes, and what it cannot see: streams, errors, the key.

Left out: the answers' own fields, which the dialects' owners specify.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from qwen2.server.errors import Dialect
from qwen2.server.guard import OPEN, dialect_of

Json = dict[str, Any]
ERRORS = {
    400: "What is asked for cannot be done; the message names the field.",
    401: "The server wants its key.",
    403: "Not under this name, or not from that page.",
    404: "No such model.",
    413: "The body is too large.",
    429: "Too many requests run or wait.",
    500: "The model failed, or cannot be loaded.",
    503: "Not enough memory just now, or the answer was broken off.",
}
OF_PATHS = {"/v1/models": (401, 403), "/v1/models/{name}": (400, 401, 403, 404), "/metrics": (401, 403), "/health": (403, 503)}
OF_PATHS |= dict.fromkeys(("/api/version", "/api/tags", "/api/ps"), (401, 403))
MORE = {"/api/delete": {409: "It is answering somebody."}}
STREAMS = {
    "/v1/chat/completions": "text/event-stream",
    "/v1/completions": "text/event-stream",
    "/v1/responses": "text/event-stream",
    "/v1/messages": "text/event-stream",
    "/api/chat": "application/x-ndjson",
    "/api/generate": "application/x-ndjson",
    "/api/pull": "application/x-ndjson",
}
OTHER = {"/metrics": "text/plain"}
SCHEMAS = {"application/json": {"type": "object"}, "text/plain": {"type": "string"}}
EMPTY = {"/api/copy", "/api/delete"}


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


TEXT, MAYBE = {"type": "string"}, {"type": ["string", "null"]}
SHAPES: dict[Dialect, Json] = {
    "openai": _object(error=_object(message=TEXT, type=TEXT, param=MAYBE, code=MAYBE)),
    "anthropic": _object(type={"const": "error"}, error=_object(type=TEXT, message=TEXT)),
    "ollama": _object(error=TEXT),
}


def document(app: FastAPI, has_key: bool) -> Json:
    """As OpenAPI 3.1."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # errors have each dialect's own shape
        schemas.pop(name, None)
    schemas |= {f"Error_{dialect}": shape for dialect, shape in SHAPES.items()}
    for path, methods in found["paths"].items():
        for operation in methods.values():
            operation["responses"] = _responses(path, has_key)
            if has_key and path not in OPEN:
                operation["security"] = [{"bearer": []}, {"x-api-key": []}]
    if has_key:
        header = {"type": "apiKey", "in": "header", "name": "x-api-key"}
        found["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}, "x-api-key": header}
    return found


def _responses(path: str, has_key: bool) -> Json:
    answer: Json = {"description": "The answer."}
    if path not in EMPTY:
        kinds = [OTHER.get(path, "application/json"), *([STREAMS[path]] if path in STREAMS else [])]
        answer["content"] = {kind: {"schema": SCHEMAS.get(kind, {})} for kind in kinds}
    error = {"schema": {"$ref": f"#/components/schemas/Error_{dialect_of(path)}"}}
    texts = {status: ERRORS[status] for status in OF_PATHS.get(path, tuple(ERRORS))} | MORE.get(path, {})
    if not has_key:
        texts.pop(401, None)
    found: Json = {"200": answer}
    for status, text in texts.items():
        found[str(status)] = {"description": text, "content": {"application/json": error}}
    if path == "/health":
        found["503"] = {"description": "No token can be made yet.", "content": {"application/json": {"schema": {"type": "object"}}}}
    return found
