"""Who may ask at all: the host's name, the page's origin, the key, the body's size and the number of requests, before it is read.

A browser can be made to ask a server on its own machine by any page (DNS rebinding, forms), so requests are answered only under
names that are this server's, and those that carry the origin of another page only where that was allowed.
Left out: TLS, which a proxy in front does.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.routing import Match

from qwen2.server.errors import GONE, ApiError, Dialect, body
from qwen2.server.memory import give_back

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prometheus_client import Counter as Counts
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from qwen2.server.settings import Settings

log = logging.getLogger("qwen2.server")
OPEN = {"/health"}  # asked without a key
ONE = {"GET", "HEAD", "OPTIONS"}
ID_LENGTH = 64
LARGE = 1 << 17  # bytes of a body after which memory is given back
PATIENCE = 5.0  # seconds for a body that nobody reads


def dialect_of(path: str) -> Dialect:
    """Whose errors a path's are."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    return "ollama" if path.startswith("/api/") else "openai"


def host_name(host: str) -> str:
    """A Host header without its port; nothing for one that cannot be read."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def has_key(wanted: str | None, headers: Mapping[str, str]) -> bool:
    """Whether a request has the server's key, or none is wanted. An empty one is none, and nobody's."""
    given = re.sub(r"(?i)^bearer ", "", headers.get("authorization", "")).strip() or headers.get("x-api-key", "")
    return wanted is None or (given != "" and hmac.compare_digest(given.encode(), wanted.encode()))


class Guard:
    """ASGI middleware around everything."""

    def __init__(self, app: ASGIApp, settings: Settings, responses: Counts) -> None:
        self.app, self.settings, self.responses = app, settings, responses
        self.running: Counter[str] = Counter()  # requests by client
        own = {host.lower() for host in (settings.host.strip("[]"), *settings.hosts)}
        self.hosts = own | {"localhost"} if is_loopback(settings.host) or settings.host in ("0.0.0.0", "::") else own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        request = _Request(scope, headers, send, time.monotonic())
        try:
            self._check_host(headers)
            self._check_origin(headers)
            request.extra = self._cors(headers)  # a page that may ask may read refusals too
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await request.empty(204)
                return
            client = self._check(scope, headers)
        except ApiError as error:
            if "expect" not in headers:  # a client that asks first has sent nothing yet
                await self._read_away(receive)
            await request.refuse(error)
            self._count(request)
            return
        self.running[client] += 1
        try:
            await self.app(_read_as_json(scope), self._bounded(scope, receive, request), request.send)
        finally:
            self.running[client] -= 1
            self.running += Counter()  # without those at zero
            request.log()
            self._count(request)
            if request.read > LARGE:
                await asyncio.to_thread(give_back)

    def _count(self, request: _Request) -> None:
        """By the route's own path: there are only so many, whatever clients ask for."""
        for route in request.scope["app"].routes:
            included = getattr(route, "original_router", None)  # of a router that was included
            for one in [route] if included is None else included.routes:
                if one.matches(request.scope)[0] != Match.NONE:
                    self.responses.labels(one.path_format, str(request.told)).inc()
                    return
        self.responses.labels("other", str(request.told)).inc()

    def _check(self, scope: Scope, headers: dict[str, str]) -> str:
        """The client's name. ApiError where it may not ask."""
        key = self._check_key(scope["path"], headers)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._most(scope):
            raise self._too_large(scope)
        client = key or (scope["client"] or ("unknown",))[0]
        if scope["method"] not in ONE:
            self._check_load(client)
        return client

    def _check_host(self, headers: dict[str, str]) -> None:
        name = host_name(headers.get("host", ""))
        if name in self.hosts or _is_address(name):  # an address cannot be rebound
            return
        raise ApiError(
            403, f"host {name!r} is not this server's: ask it by address, or start it with --allow-host {name}", "host_not_allowed"
        )

    def _check_origin(self, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if origin is None or "*" in self.settings.origins or origin in self.settings.origins:
            return
        if urlsplit(origin).netloc == headers.get("host"):
            return
        hint = "" if origin == "null" else f": start it with --origin {origin} to allow it"  # files and sandboxes of any page are null
        raise ApiError(403, f"pages of {origin} may not ask this server{hint}", "origin_not_allowed")

    def _check_key(self, path: str, headers: dict[str, str]) -> str | None:
        wanted = self.settings.api_key
        if wanted is None or path in OPEN or path == "/" or path.startswith("/web/"):
            return None
        if not has_key(wanted, headers):
            raise ApiError(401, "this server wants its key: send Authorization: Bearer KEY", "invalid_api_key")
        return None

    def _check_load(self, client: str) -> None:
        limits = self.settings.limits
        if self.running[client] >= limits.per_client:
            raise ApiError(
                429, f"{limits.per_client} requests of yours run or wait already; ask again when one has ended", "too_many", retry_after=1
            )
        if sum(self.running.values()) >= limits.queue:
            raise ApiError(429, f"{limits.queue} requests run or wait already; ask again", "queue_full", retry_after=2)

    def _most(self, scope: Scope) -> int:
        """Bytes that a body may have; uploaded files go to the disk as they come."""
        limits = self.settings.limits
        return limits.blob_bytes if scope["path"].startswith("/api/blobs/") else limits.body_bytes

    async def _read_away(self, receive: Receive) -> None:
        """What a refused client is still sending: it would find its connection broken, and the refusal gone with it. Not without end."""
        left = 4 * self.settings.limits.body_bytes
        begin = time.monotonic()
        while left > 0 and time.monotonic() - begin < PATIENCE:
            try:
                message = await asyncio.wait_for(receive(), PATIENCE)
            except asyncio.TimeoutError:
                return
            left -= len(message.get("body", b""))
            if not message.get("more_body"):
                return

    def _too_large(self, scope: Scope) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most(scope):,} bytes, which is this server's limit", "too_large")

    def _cors(self, headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
        origin = headers.get("origin")
        if origin is None or not ("*" in self.settings.origins or origin in self.settings.origins):
            return []
        pairs = {"access-control-allow-origin": origin, "vary": "Origin", "access-control-allow-methods": "GET, POST, DELETE, OPTIONS"}
        pairs["access-control-expose-headers"] = "x-request-id, retry-after"
        pairs |= {"access-control-allow-headers": headers.get("access-control-request-headers", "*")}
        return [(key.encode(), value.encode("latin-1")) for key, value in pairs.items()]

    def _bounded(self, scope: Scope, receive: Receive, request: _Request) -> Receive:
        """What a body without a length, or one that lies about it, may bring."""

        async def bounded() -> Message:
            message = await receive()
            request.read += len(message.get("body", b""))
            if request.read > self._most(scope):
                await self._read_away(receive)
                raise self._too_large(scope)
            return message

        return bounded


class _Request:
    """One request on its way out: its id, its status, and what is logged."""

    def __init__(self, scope: Scope, headers: dict[str, str], send: Send, start: float) -> None:
        self.scope, self._send, self.start, self.status = scope, send, start, 0
        given = headers.get("x-request-id", "")
        self.id = given if given.isascii() and given.isprintable() and 0 < len(given) <= ID_LENGTH else f"req-{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = self.id
        self.extra: list[tuple[bytes, bytes]] = []
        self.read = 0  # bytes of its body
        self.is_whole = False  # its answer was sent to the end

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", self.id.encode()), *self.extra]}
        await self._send(message)
        self.is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def refuse(self, error: ApiError) -> None:
        """An error in place of an answer."""
        content = json.dumps(body(error, dialect_of(self.scope["path"]))).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close", **(error.headers or {})}
        start = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": start})
        await self.send({"type": "http.response.body", "body": content})
        self.log()

    async def empty(self, status: int) -> None:
        """An answer without a body."""
        await self.send({"type": "http.response.start", "status": status, "headers": []})
        await self.send({"type": "http.response.body", "body": b""})

    @property
    def told(self) -> int:
        """Its status; an answer that its client did not wait for is a 499, whatever it began as."""
        return self.status if self.is_whole else GONE

    def log(self) -> None:
        """One line for one request."""
        seconds = time.monotonic() - self.start
        log.info("%s %s %s %d %.2f s", self.id, self.scope["method"], self.scope["path"], self.told, seconds)


def _read_as_json(scope: Scope) -> Scope:
    """Bodies are JSON whatever they are called: Ollama's own examples say `curl -d`, which names a form, and some clients name nothing.

    No page elsewhere gains by it: what keeps those out is their origin, which browsers name with every such request.
    """
    if scope["method"] in ONE or scope["path"].startswith("/api/blobs/"):
        return scope
    others = [pair for pair in scope["headers"] if pair[0].lower() != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
