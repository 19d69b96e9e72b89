"""An answer that is broken off is never told as whole: an error event ends its stream, a 503 is what others get."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.conftest import NAME, Running

MESSAGES = [{"role": "user", "content": "Hello"}]
WORDS = "the answer was broken off, since its model went from memory: ask again"
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
        assert (last["type"], last["message"]) == ("error", WORDS)
    else:
        assert (last["error"] if path.startswith("/api") else last["error"]["message"]) == WORDS
    assert not any(sign in answer.text for sign in ("[DONE]", "message_stop", "response.completed", '"done":true', '"stop"'))


def test_half_a_vector_is_none(running: Running) -> None:
    assert broken_off(running, "/v1/embeddings", input="a").status_code == 503


def test_what_is_not_in_memory_is_not_unloaded(running: Running) -> None:
    assert running.post("/qwen2/stop", model=NAME).json() == {"unloaded": False, "broken_off": 0}
    assert running.post("/qwen2/stop", model="tiny:none").status_code == 404
