"""An answer that is broken off is never told as whole: an error event ends its stream, a 503 is what others get."""

from __future__ import annotations

import io
import json
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from qwen2.server.app import create_app
from qwen2.server.ending import Ending
from qwen2.server.settings import Settings
from qwen2.weights.store import Store
from tests.server.conftest import NAME, Running
from tests.server.test_gone import until

MESSAGES = [{"role": "user", "content": "Hello"}]
WORDS = "the answer was broken off: its model was unloaded, or the server ends; ask again"
PATHS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
    ("/v1/responses", {"input": "a"}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
    ("/api/chat", {"messages": MESSAGES}),
    ("/api/generate", {"prompt": "a"}),
]


def broken_off(running: Running, path: str, **body: Any) -> Any:
    """The answer where the model is stopped before the first step."""
    assert running.post("/qwen2/open", model=NAME).status_code == 200
    engine = running.server.models.loaded[NAME].llm.engine
    with ThreadPoolExecutor(1) as pool, engine.lock:
        asked = pool.submit(running.post, path, model=NAME, **body)
        while not engine.inbox:
            time.sleep(0.005)
        assert running.post("/qwen2/stop", model=NAME).json() == {"unloaded": True, "broken_off": 1}
        assert not running.server.models.loaded
        engine.lock.release()
        try:
            return asked.result(30)
        finally:
            engine.lock.acquire()


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_the_whole_is_a_503(running: Running, path: str, body: dict[str, Any]) -> None:
    answer = broken_off(running, path, **body, stream=False)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    error = answer.json()["error"]
    assert (error if isinstance(error, str) else error["message"]) == WORDS
    assert running.chat(max_tokens=2).status_code == 200  # loaded anew


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_a_stream_ends_in_an_error(running: Running, path: str, body: dict[str, Any]) -> None:
    answer = broken_off(running, path, **body, stream=True)
    told = [line.removeprefix("data: ") for line in answer.text.splitlines() if line and not line.startswith(("event: ", ":"))]
    last = json.loads(told[-1])
    if path == "/v1/responses":
        failed, before = last["response"], json.loads(told[-2])
        assert (last["type"], failed["status"], failed["error"]["message"]) == ("response.failed", "failed", WORDS)
        assert (before["type"], before["message"], before["sequence_number"]) == ("error", WORDS, last["sequence_number"] - 1)
    else:
        assert (last["error"] if path.startswith("/api") else last["error"]["message"]) == WORDS
    assert not any(sign in answer.text for sign in ("[DONE]", "message_stop", "response.completed", '"done":true', '"stop"'))


def test_half_a_vector_is_none(running: Running) -> None:
    assert broken_off(running, "/v1/embeddings", input="a").status_code == 503


def test_what_is_not_in_memory_is_not_unloaded(running: Running) -> None:
    assert running.post("/qwen2/stop", model=NAME).json() == {"unloaded": False, "broken_off": 0}
    assert running.post("/qwen2/stop", model="tiny:none").status_code == 404


@pytest.mark.parametrize("patience", [0, 1000])
def test_a_server_that_ends_breaks_off_what_it_does_not_finish(home: Path, monkeypatch: pytest.MonkeyPatch, patience: float) -> None:
    """When its patience is over, or at the second Ctrl-C."""
    said = io.StringIO()  # not capsys: what is printed while that is read is lost
    monkeypatch.setattr(sys, "stderr", said)
    app = create_app(Settings(port=0), Store(home))
    parts = app.state.server
    server = Ending(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"), parts.models, parts.works, patience)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    running = Running(url, app.state.server, httpx.Client(base_url=url, timeout=60))
    assert running.post("/qwen2/open", model=NAME).status_code == 200
    engine = running.server.models.loaded[NAME].llm.engine
    with ThreadPoolExecutor(1) as pool:
        with engine.lock:  # nothing moves
            asked = pool.submit(running.chat, stream=True)
            until(lambda: len(engine.inbox) == 1)
            server.handle_exit(signal.SIGINT, None)
            until(lambda: "Ctrl-C again" in said.getvalue())
            if patience:
                assert not engine.horizons
                server.handle_exit(signal.SIGINT, None)
            until(lambda: bool(engine.horizons))
        last = asked.result().text.splitlines()[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == WORDS
    thread.join(30)
    assert not thread.is_alive()
    assert said.getvalue() == "qwen2: finishing 1 answer; Ctrl-C again ends it\n"
