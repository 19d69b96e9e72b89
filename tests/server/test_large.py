"""Large requests beside small ones: they are refused before they are encoded, read on other threads, and keep nobody out."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qwen2.server.settings import Limits
from tests.server.conftest import NAME, Running

HUGE = "x" * 300_000  # the longest of the vocabulary's tokens has 10 bytes and the window is 1,024
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
    assert answer.status_code == 400
    assert re.fullmatch(r"prompt has at least 30,0\d\d tokens, the window is 1,024: shorten the prompt", message_of(answer))


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


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stop": None}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "stop_sequences": None}),
        ("/api/chat", {"messages": [{"role": "user", "content": "a"}], "options": {"stop": None}}),
        ("/api/generate", {"prompt": "a", "options": {"stop": None}}),
        ("/api/create", {"model": "mine:stops", "from": NAME, "parameters": {"stop": None}}),
        ("/api/create", {"model": "mine:stops", "modelfile": None}),
    ],
)
@pytest.mark.parametrize("stops", [["a"] * 4, ["a" * 11]])
def test_stop_strings_are_few_and_short(serve: Callable[..., Running], path: str, body: dict[str, Any], stops: list[str]) -> None:
    """Each is looked for at every token, on the thread that writes everybody's."""
    running = serve(limits=Limits(stops=3, stop_characters=10))
    said = json.dumps({"stream": False, "model": NAME, **body})
    lines = "".join(f"PARAMETER stop {stop}\n" for stop in stops)
    said = said.replace('"modelfile": null', f'"modelfile": {json.dumps(f"FROM {NAME}" + chr(10) + lines)}').replace(
        "null", json.dumps(stops)
    )
    refused = running.client.post(path, content=said.encode())
    assert (refused.status_code, message_of(refused)) == (400, "stop: at most 3 texts of at most 10 characters")


# --- many prompts


@pytest.mark.parametrize("stream", [False, True])
def test_one_request_of_many_prompts_leaves_places_to_others(serve: Callable[..., Running], stream: bool) -> None:
    """Handed in at once, a small one that comes behind is admitted before those that still wait; and each text is what it is alone."""
    running = serve(max_batch=4)
    running.chat(max_tokens=1)
    engine = running.server.models.loaded[NAME].llm.engine
    greedy = {"model": NAME, "temperature": 0, "max_tokens": 6, "logit_bias": {"511": -100, "509": -100}}
    prompts = [f"{number} the fox" for number in range(12)]
    alone = [running.post("/v1/completions", prompt=one, **greedy).json()["choices"][0]["text"] for one in prompts]
    submit, handed_in, ids = engine.submit, list[Any](), engine.tokenizer.encode("small")

    def watched(request: Any) -> None:
        handed_in.append(request)
        submit(request)

    def little() -> list[Any]:
        return [request for request in handed_in if request.prompt == ids]

    engine.submit = watched
    with ThreadPoolExecutor(2) as pool:
        with engine.lock:  # nothing moves
            many = pool.submit(running.post, "/v1/completions", prompt=prompts, stream=stream, **greedy)
            while len(handed_in) < 3:
                pass
            small = pool.submit(running.post, "/v1/completions", prompt="small", **greedy)
            while not little():
                pass
        assert small.result().status_code == 200
        answer = many.result()
    assert len(handed_in) == 13
    assert sum(other.admitted < little()[0].admitted for other in handed_in) == 3
    texts = [""] * len(prompts)
    told = [answer.json()] if not stream else [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    for choice in (choice for one in told for choice in one["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == alone


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed"])
def test_texts_to_embed_are_answers_in_the_queue(serve: Callable[..., Running], path: str) -> None:
    running = serve(limits=Limits(queue=4, inputs=6))
    running.chat(max_tokens=1)
    engine = running.server.models.loaded[NAME].llm.engine
    with ThreadPoolExecutor(1) as pool:
        with engine.lock:
            waiting = pool.submit(running.post, path, model=NAME, input=["a"] * 3)
            while not engine.inbox:
                pass
            refused = running.post(path, model=NAME, input=["a"] * 2)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
            assert message_of(refused) == "3 answers run or wait already, and with 2 more they are over 4: ask again"
            assert running.chat(n=2, max_tokens=1).status_code == 429
        assert waiting.result().status_code == 200
    assert running.post(path, model=NAME, input=["a"] * 6).status_code == 200, "alone, one may be larger than the queue"
    refused = running.post(path, model=NAME, input=["a"] * 7)
    assert (refused.status_code, message_of(refused)) == (400, "input has 7 texts: 1 to 6 at once")
    assert running.server.answers == 0


def test_answers_count_and_not_requests_alone(serve: Callable[..., Running]) -> None:
    running = serve(limits=Limits(queue=8))
    running.chat(max_tokens=1)
    engine = running.server.models.loaded[NAME].llm.engine
    refused = running.post("/v1/completions", model=NAME, prompt=["a"] * 3, n=3, max_tokens=1)
    assert (refused.status_code, message_of(refused)) == (
        400,
        "this asks for 9 answers, prompts times n, and this server takes 8 at once: send fewer",
    )
    with ThreadPoolExecutor(1) as pool:
        with engine.lock:
            waiting = pool.submit(running.post, "/v1/completions", model=NAME, prompt=["a"] * 3, n=2, max_tokens=1)
            while not engine.inbox:
                pass
            refused = running.chat(n=3, max_tokens=1)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
            assert message_of(refused) == "6 answers run or wait already, and with 3 more they are over 8: ask again"
        assert waiting.result().status_code == 200
    assert running.chat(n=3, max_tokens=1).status_code == 200
    begin = time.monotonic()
    while running.server.answers and time.monotonic() - begin < 20:  # let go a moment after the last byte is read
        time.sleep(0.01)
    assert running.server.answers == 0
