"""A client that leaves while it waits for a model: none is loaded for it, and none is lost."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from tests.server.conftest import NAME, Running


@contextmanager
def asking(running: Running, model: str, path: str = "/v1/completions", **more: Any) -> Iterator[None]:
    """A client that asks and leaves at the end."""
    asked = {"prompt": "a", "max_tokens": 1} if path == "/v1/completions" else {}
    body = json.dumps({"model": model, **asked, **more})
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
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


def ended(running: Running, model: str = NAME) -> dict[str, int]:
    """Answers counted so far, by how they ended."""
    found = re.findall(rf'^qwen2_requests_total{{model="{model}",reason="(\w+)"}} ([0-9.]+)$', running.client.get("/metrics").text, re.M)
    return {reason: int(float(count)) for reason, count in found}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_answers_whose_client_left_are_counted_and_logged_as_such(running: Running, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qwen2.server")
    assert running.chat(max_tokens=1, ignore_eos=True, stream=stream).status_code == 200
    assert ended(running) == {"length": 1}
    engine = running.server.models.loaded[NAME].llm.engine
    with engine.lock:  # nothing is written before it is seen that they left
        with asking(running, NAME, stream=stream, n=2):
            until(lambda: bool(engine.inbox))
        until(lambda: len(ended(running)) == 2)
    assert ended(running) == {"length": 1, "gone": 2}
    until(lambda: any("/v1/completions 499 " in line for line in caplog.messages))
    assert any("/v1/chat/completions 200 " in line for line in caplog.messages)
    assert not any("/v1/completions 200 " in line for line in caplog.messages)


def test_who_leaves_before_the_model_is_there_is_counted(running: Running) -> None:
    begun, go = held_load(running)
    with asking(running, NAME):
        assert begun.wait(20)
    until(lambda: running.server.answers == 0)
    go.set()
    until(lambda: NAME in running.server.models.loaded)
    until(lambda: ended(running) == {"gone": 1})


def test_texts_that_are_embedded_are_counted(running: Running) -> None:
    assert running.post("/v1/embeddings", model=NAME, input=["a rose", "b"]).status_code == 200
    assert ended(running) == {"embedded": 2}
    assert running.post("/api/embed", model=NAME, input="Hello").status_code == 200
    assert running.post("/api/embeddings", model=NAME, prompt="Hello").status_code == 200
    assert ended(running) == {"embedded": 4}
    llm = running.server.models.loaded[NAME].llm
    read = sum(len(llm.tokenizer.encode(text)) for text in ("a rose", "b", "Hello", "Hello"))
    assert f'qwen2_prompt_tokens_total{{model="{NAME}"}} {float(read)}\n' in running.client.get("/metrics").text
    with llm.engine.lock:  # nothing is read before it is seen that they left
        with asking(running, NAME, "/v1/embeddings", input=["a", "b"]):
            until(lambda: len(llm.engine.inbox) == 2)
        until(lambda: ended(running) == {"embedded": 4, "gone": 2})


def test_answers_that_end_by_an_error_are_counted(running: Running) -> None:
    running.chat(max_tokens=1, ignore_eos=True)
    runner = running.server.models.loaded[NAME].llm.engine.runner
    forward = runner.forward

    def failing(batch: Any) -> Any:
        raise MemoryError

    runner.forward = failing
    assert running.chat(max_tokens=5, n=3).status_code == 503
    assert running.post("/v1/embeddings", model=NAME, input=["a", "b"]).status_code == 503
    runner.forward = forward
    assert ended(running) == {"length": 1, "error": 5}
