"""The chat page: its files, under a policy that lets the browser run and load nothing but them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from qwen2.config import FAMILY
from qwen2.weights.registry import ENTRIES

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.responses import Response
    from starlette.types import Scope

FOLDER = Path(__file__).parent / "web"
POLICY = "; ".join(
    [
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:", "font-src 'self'",
        "connect-src 'self'",
        "form-action 'none'", "base-uri 'none'", "frame-ancestors 'none'",
    ]
)  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


class Files(StaticFiles):
    """The page's files; the browser asks each time whether they have changed, since another version may serve tomorrow."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        answer = await super().get_response(path, scope)
        answer.headers.update(HEADERS)
        return answer


@router.get("/")
async def index() -> FileResponse:
    """The page."""
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


@router.get("/web/models.json")
async def models() -> list[dict[str, Any]]:
    """What can be pulled, the smallest first."""
    found = []
    for name, entry in ENTRIES.items():
        release = FAMILY.get(name)
        size = None if entry.known is None else entry.known.size
        parameters = None if release is None else release.config.parameters()
        found.append({"name": name, "size": size, "parameters": parameters, "licence": entry.licence})
    return sorted(found, key=lambda one: (one["parameters"] or 0, one["name"]))


def add_page(app: FastAPI) -> None:
    """At / and under /web."""
    app.include_router(router)
    app.mount("/web", Files(directory=FOLDER))
