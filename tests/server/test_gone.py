"""A client that leaves while it waits for a model: none is loaded for it, and none is lost."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.server.conftest import NAME, Running


@contextmanager
def asking(running: Running, model: str) -> Iterator[None]:
    """A client that asks and leaves at the end."""
    body = json.dumps({"model": model, "prompt": "a", "max_tokens": 1})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as connection:
        connection.sendall((head + body).encode())
        yield


def until(holds: Callable[[], bool]) -> None:
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() - begin < 20, "waited in vain"
        time.sleep(0.005)


def loads_of(running: Running) -> list[str]:
    """Names in the order in which they are loaded from now on."""
    models, found = running.server.models, list[str]()
    load = models._load

    def watched(name: str) -> Any:
        found.append(name)
        return load(name)

    models._load = watched
    return found


def test_nothing_is_loaded_for_who_has_gone(serve: Callable[..., Running]) -> None:
    running = serve(max_loaded=1)
    running.chat(max_tokens=1)
    server, loads = running.server, loads_of(running)
    engine = server.models.loaded[NAME].llm.engine
    with ThreadPoolExecutor(1) as pool:
        with engine.lock:  # the one place is taken
            writing = pool.submit(running.chat, max_tokens=3)
            until(lambda: len(engine.inbox) == 1)
            with asking(running, "tiny:two"):
                until(lambda: server.answers == 2)
            until(lambda: server.answers == 1)
        assert writing.result().status_code == 200
    assert running.chat(max_tokens=1).status_code == 200
    assert (loads, list(server.models.loaded)) == ([], [NAME])


def held_load(running: Running) -> tuple[threading.Event, threading.Event]:
    """Loads wait from now on: an event that one has begun, and one that lets it go on."""
    begun, go, watched = threading.Event(), threading.Event(), running.server.models._load

    def slow(name: str) -> Any:
        begun.set()
        assert go.wait(20)
        return watched(name)

    running.server.models._load = slow
    return begun, go


def test_a_load_goes_on_for_others_when_the_first_has_gone(running: Running) -> None:
    server, loads = running.server, loads_of(running)
    begun, go = held_load(running)
    with ThreadPoolExecutor(1) as pool:
        with asking(running, NAME):
            assert begun.wait(20)
        until(lambda: server.answers == 0)
        second = pool.submit(running.chat, max_tokens=2)
        until(lambda: server.answers == 1)
        go.set()
        assert second.result().status_code == 200
    assert loads == [NAME]
    until(lambda: server.models.loaded[NAME].users == 0)


def test_a_model_that_nobody_waited_for_is_free(serve: Callable[..., Running]) -> None:
    running = serve(max_loaded=1)
    server, loads = running.server, loads_of(running)
    begun, go = held_load(running)
    with ThreadPoolExecutor(1) as pool:
        with asking(running, NAME):
            assert begun.wait(20)
        until(lambda: server.answers == 0)
        other = pool.submit(running.post, "/v1/completions", model="tiny:two", prompt="a", max_tokens=1)
        until(lambda: server.answers == 1)
        go.set()
        assert other.result().status_code == 200
    assert (loads, list(server.models.loaded)) == ([NAME, "tiny:two"], ["tiny:two"])
