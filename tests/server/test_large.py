"""Large requests beside small ones: they are refused before they are encoded, read on other threads, and keep nobody out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qwen2.server.settings import Limits
from tests.server.conftest import NAME, Running

HUGE = "x" * 20_000  # the longest of the vocabulary's tokens has 10 bytes and the window is 1,024
ASKED = [{"role": "user", "content": HUGE}]


def message_of(answer: Any) -> str:
    error = answer.json()["error"]
    return str(error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": ASKED}),
        ("/v1/chat/completions", {"messages": [*ASKED, {"role": "assistant", "content": "a"}], "continue_final_message": True}),
        ("/v1/completions", {"prompt": ["a", HUGE]}),
        ("/v1/responses", {"input": HUGE}),
        ("/v1/messages", {"messages": ASKED, "max_tokens": 5}),
        ("/api/chat", {"messages": ASKED}),
        ("/api/generate", {"prompt": HUGE}),
        ("/api/generate", {"prompt": HUGE, "raw": True}),
        ("/v1/embeddings", {"input": ["a", HUGE]}),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_encoded(
    running: Running, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    running.chat(max_tokens=1)
    tokenizer = running.server.models.loaded[NAME].llm.tokenizer
    encode = tokenizer.encode

    def encoded(text: str) -> list[int]:
        assert len(text) < 1000
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", encoded)
    answer = running.post(path, model=NAME, **body)
    assert (answer.status_code, message_of(answer)) == (
        400,
        "prompt has at least 2,000 tokens, the window is 1,024: shorten the prompt",
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "Hello"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/qwen2/count", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/api/embed", {"input": "Hello", "truncate": True}),
    ],
)
def test_others_are_answered_while_a_text_is_encoded(
    running: Running, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    running.chat(max_tokens=1)
    tokenizer = running.server.models.loaded[NAME].llm.tokenizer
    encode, begun, answered = tokenizer.encode, threading.Event(), threading.Event()

    def slow(text: str) -> list[int]:
        begun.set()
        assert answered.wait(20), "nobody else was answered meanwhile"
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", slow)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.post, path, model=NAME, **body)
        assert begun.wait(20)
        assert running.client.get("/health").status_code == 200
        answered.set()
        assert asked.result().status_code == 200


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "messages"), ("/v1/messages", "messages"), ("/v1/messages/count_tokens", "messages"),
        ("/v1/responses", "input"), ("/api/chat", "messages"), ("/tokenize", "messages"), ("/qwen2/count", "messages"),
        ("/qwen2/chat", "messages"),
    ],
)  # fmt: skip
def test_a_conversation_has_so_many_messages_at_most(serve: Callable[..., Running], path: str, field: str) -> None:
    running = serve(limits=Limits(messages=3))
    most = {"max_tokens": 5} if path == "/v1/messages" else {"id": "0123456789abcdef"} if path == "/qwen2/chat" else {}

    def ask(count: int) -> Any:
        return running.post(path, model=NAME, **{field: [{"role": "user", "content": "a"}] * count}, **most)

    refused = ask(4)
    assert (refused.status_code, message_of(refused)) == (
        400,
        f"{field} has 4 entries: this server reads at most 3 of one request",
    )
    assert ask(3).status_code == 200
