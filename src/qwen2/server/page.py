"""The chat page: the files below `web/`, to browsers only, with headers that let it load from nowhere but here.

Files are looked up among the names that the installed package has, so that no path leads elsewhere; they are read when asked for.
Left out: a build step, compression, and whatever the page does, which is in `web/` itself.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from importlib.abc import Traversable

    from fastapi import FastAPI

TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "ico": "image/x-icon",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "mjs": "text/javascript; charset=utf-8",
    "png": "image/png",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
    "webmanifest": "application/manifest+json",
    "woff2": "font/woff2",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",
    "font-src": "'self'",
    "connect-src": "'self'",
    "manifest-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{kind} {sources}" for kind, sources in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked about every time: an update of the package is seen at once
}
RUNNING = "Ollama is running"  # what clients of Ollama look for to know that they may ask


def add_page(app: FastAPI) -> None:
    """Serve the page under / and its files under /web/."""
    root = files("qwen2.server") / "web"
    table = dict(walk(root, "web"))

    async def page(request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            return Response(RUNNING, media_type="text/plain", headers={"Vary": "Accept"})
        return answer(request, table["web/index.html"], {"Vary": "Accept"})

    async def file(request: Request, name: str) -> Response:
        found = table.get(f"web/{name}")
        if found is None:
            raise HTTPException(404, "the page has no such file")
        return answer(request, found, {})

    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/web/{name:path}", file, methods=["GET", "HEAD"], include_in_schema=False)


def walk(folder: Traversable, name: str) -> list[tuple[str, Traversable]]:
    """The files below a folder that a browser has a use for, with their names."""
    found = []
    for entry in folder.iterdir():
        full = f"{name}/{entry.name}"
        if entry.is_dir():
            found += walk(entry, full)
        elif suffix(entry) in TYPES:
            found.append((full, entry))
    return found


def suffix(entry: Traversable) -> str:
    """How its name ends."""
    return entry.name.rpartition(".")[2]


def answer(request: Request, entry: Traversable, extra: dict[str, str]) -> Response:
    """The file, or that the browser's copy is still right."""
    content = entry.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, **extra, "ETag": tag}
    known = {one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")}
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=TYPES[suffix(entry)], headers=headers)
