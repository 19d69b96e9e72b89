"""Repositories of models behind HTTPS: the Hugging Face Hub and ModelScope. Lists their files and fetches them with resume.

Both are asked plainly, with Range requests over httpx: neither's client library, cache or account is needed, and the same code
serves a mirror given as `HF_ENDPOINT`. What is left out: private repositories and uploads.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen2.weights.registry import Entry, File

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from qwen2.weights.partial import Partial

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
RETRIES = 4  # connections lost in a row, without a byte between them, until a source is given up
CHUNK = 1 << 18


@dataclass(frozen=True)
class Hub:
    """One hub: where it lists a repository's files, where it serves one, and how its listing is read."""

    label: str
    endpoint: str
    listing_path: str
    file_path: str
    read_listing: Callable[[Any], list[File]]
    pause: float = 1.0  # seconds between tries, growing by as much each time

    @cached_property
    def client(self) -> httpx.Client:
        import httpx  # a tenth of a second that `qwen2 list` need not wait for

        timeout = httpx.Timeout(60.0, connect=10.0)
        return httpx.Client(follow_redirects=True, timeout=timeout, headers={"Accept-Encoding": "identity", "User-Agent": "qwen2"})

    def has(self, entry: Entry) -> bool:
        return entry.repository is not None

    def files(self, entry: Entry) -> tuple[File, ...]:
        """The entry's files as this hub lists them. Errors as in `fetch`."""
        import httpx

        url = self.endpoint.rstrip("/") + self.listing_path.format(repository=entry.repository)
        try:
            answer = self.client.get(url)
        except httpx.HTTPError as error:
            raise ConnectionError(_reason(error)) from error
        self._check_status(answer, str(entry.repository))
        try:
            listed = self.read_listing(answer.json())
        except (ValueError, KeyError, TypeError) as error:
            raise ConnectionError("its answer is not a list of files") from error
        wanted = [file for file in listed if FILE_NAME.fullmatch(file.path) and any(fnmatchcase(file.path, p) for p in entry.wanted)]
        if not any(file.path.endswith((".safetensors", ".gguf")) for file in wanted):
            raise ConnectionError(f"{entry.repository} holds none of {', '.join(entry.wanted)}")
        return tuple(sorted(wanted, key=lambda file: file.path))

    def fetch(self, entry: Entry, file: File, partial: Partial, advance: Callable[[int], None]) -> None:
        """Append the missing bytes to `partial`. ConnectionError: not to be had; ValueError: had, and not what it should be."""
        import httpx

        url = self.endpoint.rstrip("/") + self.file_path.format(repository=entry.repository, path=file.path)
        lost = 0
        while partial.size < file.size:
            before = partial.size
            try:
                self._stream(url, file, partial, advance)
            except httpx.HTTPError as error:
                lost = 1 if partial.size > before else lost + 1
                if lost > RETRIES or isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol)):
                    raise ConnectionError(_reason(error)) from error
                time.sleep(self.pause * lost)

    def _stream(self, url: str, file: File, partial: Partial, advance: Callable[[int], None]) -> None:
        """One request for what is missing, to its end or until the connection is lost."""
        import httpx

        headers = {"Range": f"bytes={partial.size}-"} if partial.size else {}
        with self.client.stream("GET", url, headers=headers) as answer:
            self._check_status(answer, file.path)
            self._check_identity(answer, file)
            if answer.status_code != 206:  # the whole file, whatever was asked for
                partial.rewind(0)
            elif not answer.headers.get("Content-Range", "").startswith(f"bytes {partial.size}-"):
                raise ConnectionError("answers with other bytes than asked for")
            for data in answer.iter_raw(CHUNK):
                partial.append(data)
                advance(partial.size)
        if partial.size < file.size:
            raise httpx.RemoteProtocolError("ended early")

    def _check_status(self, answer: httpx.Response, what: str) -> None:
        if answer.status_code >= 400:
            meaning = {401: "asks for an account", 403: "asks for an account", 404: "does not have it", 429: "is too busy"}
            raise ConnectionError(f"HTTP {answer.status_code} for {what}: {meaning.get(answer.status_code, 'failed')}")

    def _check_identity(self, answer: httpx.Response, file: File) -> None:
        """Where the hub names the digest of what it is about to send, compare before anything is sent."""
        for step in (*answer.history, answer):
            named = step.headers.get("X-Linked-ETag", "").strip('"')
            if file.sha256 is not None and SHA256.fullmatch(named) and named != file.sha256:
                raise ValueError(f"has another {file.path}: sha256 {named[:12]}..., expected {file.sha256[:12]}...")


def hugging_face(endpoint: str = "https://huggingface.co") -> Hub:
    """The Hugging Face Hub, or a mirror that speaks as it does."""
    return Hub("Hugging Face Hub", endpoint, "/api/models/{repository}/tree/main", "/{repository}/resolve/main/{path}", _read_hugging_face)


def modelscope(endpoint: str = "https://modelscope.cn") -> Hub:
    """ModelScope, which holds the same repositories."""
    listing = "/api/v1/models/{repository}/repo/files?Revision=master&Recursive=true"
    return Hub("ModelScope", endpoint, listing, "/models/{repository}/resolve/master/{path}", _read_modelscope)


def _read_hugging_face(answer: Any) -> list[File]:
    files = [item for item in answer if item["type"] == "file"]
    return [File(item["path"], _size(item["size"]), _digest(item.get("lfs", {}).get("oid"))) for item in files]


def _read_modelscope(answer: Any) -> list[File]:
    files = [item for item in answer["Data"]["Files"] if item["Type"] == "blob"]
    return [File(item["Path"], _size(item["Size"]), _digest(item.get("Sha256"))) for item in files]


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"size {value!r}")
    return value


def _digest(value: Any) -> str | None:
    return value if isinstance(value, str) and SHA256.fullmatch(value) else None


def _reason(error: Exception) -> str:
    """A transport error as the few words that a user needs."""
    text = str(error).strip()
    if "Name or service not known" in text or "getaddrinfo" in text or "name resolution" in text or "nodename nor servname" in text:
        request = getattr(error, "_request", None)  # of a redirect, where that is what failed
        return f"no connection (the address of {'its host' if request is None else request.url.host} cannot be resolved)"
    if "refused" in text:
        return "no connection (refused)"
    if "timed out" in text or not text:
        return "no connection (timed out)"
    return f"connection lost ({text})" if "[" not in text else f"no connection ({text.split('] ')[-1]})"
