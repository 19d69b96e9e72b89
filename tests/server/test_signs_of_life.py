"""Who waits is told: /health before a token can be made, and bytes on a stream before the first token."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen2.server import answering, app
from qwen2.weights.store import Store
from tests.server.conftest import NAME, Running

MESSAGES = [{"role": "user", "content": "Hello"}]


def test_health_is_503_until_a_token_was_made(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    may_load, may_step = threading.Event(), threading.Event()
    plain = app.Loader

    def slow(*given: Any) -> Any:
        load = plain(*given)

        def loading(name: str) -> Any:
            may_load.wait(30)
            llm, hold = load(name)
            forward = llm.engine.runner.forward

            def stepping(batch: Any) -> Any:
                may_step.wait(30)
                return forward(batch)

            llm.engine.runner.forward = stepping
            return llm, hold

        return loading

    monkeypatch.setattr(app, "Loader", slow)
    running = serve(load=(NAME,))
    try:
        answer = running.client.get("/health")
        assert (answer.status_code, answer.json()["status"], answer.json()["waiting"]) == (503, "loading", [NAME])
        assert answer.headers["retry-after"] == "1"
        may_load.set()
        while NAME not in running.server.models.loaded:
            pass
        assert running.client.get("/health").status_code == 503  # in memory, and no token yet
        may_step.set()
        while running.server.readiness.waiting:
            pass
        assert running.client.get("/health").json() == {"status": "ok", "models": [NAME]}
    finally:
        may_load.set()
        may_step.set()


def test_health_stays_503_where_a_model_cannot_be_loaded(home: Path, serve: Callable[..., Running], tmp_path: Path) -> None:
    store = Store(home)
    (tmp_path / "model").mkdir()
    for file in store.find(NAME).iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    store.copy(str(tmp_path / "model"), "tiny:broken")
    try:
        (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
        running = serve(load=("tiny:broken",))
        while running.server.readiness.failed is None:
            pass
        answer = running.client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")
        for path, body in (("/v1/completions", {"prompt": "a"}), ("/api/generate", {"prompt": "a"}), ("/api/chat", {"messages": MESSAGES})):
            refused = running.post(path, model="tiny:broken", **body)
            assert refused.status_code == 500
            assert "tiny:broken cannot be loaded; the server's log says why" in refused.text
            assert str(tmp_path) not in answer.text + refused.text
    finally:
        store.remove("tiny:broken")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5}),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 5}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 5}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
        ("/api/chat", {"messages": MESSAGES, "options": {"num_predict": 5}}),
    ],
)
def test_a_stream_is_not_silent_while_the_prompt_is_read(
    running: Running, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    """Also after events that come before the first token; and what was sent meanwhile is no part of any event."""
    monkeypatch.setattr(answering, "SIGN_OF_LIFE", 0.05)
    running.chat(max_tokens=1)
    engine = running.server.models.loaded[NAME].llm.engine
    asked = {"model": NAME, "stream": True, **body}
    sign = b"  " if path.startswith("/api/") else b": still at work\n\n: still at work\n\n"
    with ExitStack() as unmoved:
        unmoved.enter_context(engine.lock)
        answer = unmoved.enter_context(httpx.stream("POST", f"{running.url}{path}", json=asked, timeout=30))
        pieces, seen = answer.iter_raw(), b""
        while sign not in seen:
            seen += next(pieces)
        engine.lock.release()
        try:
            seen += b"".join(pieces)
        finally:
            engine.lock.acquire()
    if path.startswith("/api/"):
        events = [json.loads(line) for line in seen.decode().splitlines()]
        assert events[-1]["done"]
    else:
        events = [json.loads(line[6:]) for line in seen.decode().splitlines() if line.startswith("data: {")]
        assert {line.split(":")[0] for line in seen.decode().splitlines()} <= {"", "data", "event"}
    assert len(events) > 1
