"""A model in a running server of ours, for `qwen2 run`: told as if it were in this process, so that it is loaded only once.

Ours is a server that says so, is of this very version and, unless its address was given, has this very store. Only the standard
library's HTTP is used, and no torch, so that an answer begins at once. Left out: everything but conversations (client.py).

    remote = find(None, store); remote.open("qwen2.5-coder:0.5b").stream(messages, params)
"""

from __future__ import annotations

import json
import secrets
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from socket import SHUT_RDWR, socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qwen2 import __version__
from qwen2.cli.client import DEFAULT, address_of, headers_of, message_of
from qwen2.engine.about import About
from qwen2.engine.constraint import Constraint
from qwen2.engine.request import Chunk, Output, ResolvedParams, SamplingParams, Timings, TokenLogprob, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from qwen2.weights.store import Store

    Messages = Sequence[Mapping[str, str]]
    Json = dict[str, Any]

OK, NO_KEY, NOT_FOUND, SERVERS_FAULT = 200, 401, 404, 500
LOOK_SECONDS = 2.0  # for an answer to who it is
LONGEST_LINE = 1 << 26


class Server:
    """One of ours, at an address; `store` is the identity of its models' folder, as far as it was told."""

    def __init__(self, address: str) -> None:
        self.address, self.store = address, ""
        self._met = False  # it has answered
        parts = urlsplit(address if "://" in address else f"http://{address}")
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path.rstrip("/")

    @contextmanager
    def request(
        self, method: str, path: str, body: Json | None = None, seconds: float | None = None, opened: Callable[[socket], None] | None = None
    ) -> Iterator[HTTPResponse]:
        """An answer that is no error.

        Raises ValueError in the server's words where it refuses, PermissionError where it wants another key, OSError where it fails
        or is not there.
        """
        connection = self._kind(self._host, self._port, timeout=seconds)
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, f"{self._path}{path}", content, {"Content-Type": "application/json", **headers_of()})
            if opened is not None:
                opened(connection.sock)
            answer = connection.getresponse()
            self._met = True
            if answer.status != OK:
                self._refuse(answer)
            yield answer
        except HTTPException as error:
            raise OSError(f"the server at {self.address} broke off ({type(error).__name__})") from None
        except OSError as error:
            if error.errno is None:
                raise
            gone = "does not answer any more" if self._met else "does not answer"
            raise OSError(f"the server at {self.address} {gone} ({error.strerror})") from None
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Json | None = None, seconds: float | None = None) -> Json:
        """The same, as JSON."""
        with self.request(method, path, body, seconds) as answer:
            try:
                return dict(json.loads(answer.read(LONGEST_LINE)))
            except (ValueError, TypeError):
                raise OSError(f"what answers at {self.address} is no server of ours") from None

    def _refuse(self, answer: HTTPResponse) -> None:
        try:
            text = message_of(json.loads(answer.read(LONGEST_LINE)))
        except (ValueError, TypeError, KeyError):
            raise OSError(f"what answers at {self.address} is no server of ours (status {answer.status})") from None
        if answer.status == NO_KEY:
            sent = "does not take the key in QWEN2_API_KEY" if headers_of() else "wants its key: set QWEN2_API_KEY"
            raise PermissionError(f"the server at {self.address} {sent}")
        if answer.status == NOT_FOUND:
            raise FileNotFoundError(text)
        raise OSError(text) if answer.status >= SERVERS_FAULT else ValueError(text)

    def open(self, model: str) -> Remote:
        """The model, loaded there. FileNotFoundError where the server does not have it."""
        found = self.ask("POST", "/qwen2/open", {"model": model})
        return Remote(self, About.from_json(found["about"]), float(found["seconds"]))


def is_named(address: str | None) -> bool:
    """Whether a certain server is meant, and not whatever may be at the default address."""
    return address is not None or address_of(address) != DEFAULT


def find(address: str | None, store: Store) -> tuple[Server | None, str]:
    """The server to talk to, and where there is none, why not, in a few words; empty where nothing answers and none was named."""
    place, named = address_of(address), is_named(address)
    server = Server(place)
    try:
        who = server.ask("GET", "/qwen2", seconds=LOOK_SECONDS)
    except PermissionError as error:
        return None, str(error)
    except (ValueError, FileNotFoundError) as error:
        return None, f"the server at {place} says: {' '.join(str(error).split())}" if named else ""
    except OSError as error:
        said = " ".join(str(error).split())
        return None, (said if place in said else f"the server at {place} does not answer ({said})") if named else ""
    if who.get("program") != "qwen2":
        return None, f"what answers at {place} is no server of ours" if named else ""
    if who.get("version") != __version__:
        return None, f"the server at {place} is qwen2 {str(who.get('version'))[:20]}, and this is {__version__}"
    server.store = str(who.get("store"))
    if not named and server.store != store.identity:
        return None, f"the server at {place} has another store of models"
    return server, ""


class Remote:
    """A model in a server, as whom a conversation is held with (partner.py)."""

    def __init__(self, server: Server, about: About, load_seconds: float) -> None:
        self.server, self.about, self.load_seconds = server, about, load_seconds
        self._id = self._memory = ""
        self._socket: socket | None = None

    def stream(self, messages: Messages, params: SamplingParams) -> Iterator[Chunk]:
        """As the engine there gives it. Raises ValueError for bad input, before the first piece."""
        self._id = secrets.token_hex(16)
        body = {"model": self.about.name, "id": self._id, "messages": [dict(one) for one in messages], "params": _given(params)}
        pieces = self._pieces(body)
        next(pieces)  # the server's first word: it has taken the question, or refuses it
        return pieces  # type: ignore[return-value]

    def _pieces(self, body: Json) -> Iterator[Chunk | None]:
        with self.server.request("POST", "/qwen2/chat", body, opened=self._opened) as answer:
            yield None
            complete = False
            while line := answer.readline(LONGEST_LINE):
                found = json.loads(line)
                if "error" in found:
                    raise OSError(str(found["error"]))
                complete = complete or "output" in found
                self._memory = found.get("memory", self._memory)
                yield _chunk(found)
            if not complete:
                raise OSError(f"the server at {self.server.address} ended in the middle of the answer")

    def _opened(self, connection: socket) -> None:
        self._socket = connection

    def abort(self) -> None:
        """Asks the server to end the answer, on a thread: this one goes on showing what still comes."""
        threading.Thread(target=self._end, args=(self._id,), daemon=True).start()

    def _end(self, id: str) -> None:
        try:
            self.server.ask("POST", "/qwen2/end", {"id": id}, LOOK_SECONDS)
        except (OSError, ValueError):  # it does not answer: whoever waits for the rest is told
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(SHUT_RDWR)

    def count(self, messages: Messages) -> int:
        """As it is read there."""
        return int(
            self.server.ask("POST", "/qwen2/count", {"model": self.about.name, "messages": [dict(one) for one in messages]})["tokens"]
        )

    def memory(self) -> str:
        """Of the server's process."""
        return f"{self._memory} of the server at {self.server.address}" if self._memory else f"in the server at {self.server.address}"

    def notes(self) -> list[str]:
        """Its metrics have the rest."""
        return []


def _given(params: SamplingParams) -> Json:
    """What is not left open."""
    standard = SamplingParams()
    return {name: value for name, value in asdict(params).items() if getattr(params, name) != getattr(standard, name)}


def _chunk(found: Json) -> Chunk:
    if "output" not in found:
        return Chunk(found["text"], index=found["index"])
    output = _output(found["output"])
    return Chunk(found["text"], index=found["index"], finish_reason=output.finish_reason, output=output)


def _output(values: Json) -> Output:
    params = values["params"]
    constraint = None if params["constraint"] is None else Constraint.read(params["constraint"])
    biases = {int(token): bias for token, bias in params["logit_bias"].items()}
    logprobs = values["logprobs"]
    parts = {
        "token_ids": tuple(values["token_ids"]),
        "usage": Usage(**values["usage"]),
        "timings": Timings(**values["timings"]),
        "params": ResolvedParams(**{**params, "constraint": constraint, "logit_bias": biases}),
        "logprobs": None if logprobs is None else tuple(_logprob(one) for one in logprobs),
    }
    return Output(**{**values, **parts})


def _logprob(one: Json) -> TokenLogprob:
    return TokenLogprob(one["token_id"], one["logprob"], one["rank"], tuple((token, value) for token, value in one["top"]))
