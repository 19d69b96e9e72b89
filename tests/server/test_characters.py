"""Half a character in a request: refused before anything is written, with the field's name, or read as U+FFFD where it is for the model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import NAME, Running

HALF = "\ud83d"
MESSAGES: list[Any] = [{"role": "user", "content": f"a{HALF}b"}]
TOOLS: list[Any] = [{"type": "function", "name": "f", "description": HALF, "parameters": {}}]


def asked(running: Running, path: str, body: dict[str, Any]) -> httpx.Response:
    return running.client.post(path, content=json.dumps({"model": NAME, **body}).encode())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/responses", {"input": "a", "user": HALF}, "user"),
        ("/v1/responses", {"input": "a", "metadata": {"a": "b", "key": f"x{HALF}"}}, "metadata.key"),
        ("/v1/responses", {"input": "a", "metadata": {HALF: "b"}}, "metadata.\\ud83d"),
        ("/v1/responses", {"input": "a", "instructions": HALF}, "instructions"),
        ("/v1/responses", {"input": "a", "tools": TOOLS}, "tools.0.description"),
        ("/v1/chat/completions", {"messages": MESSAGES, "response_format": {"type": "choice", "choices": ["a", HALF]}}, "response_format.choices.1"),
        ("/v1/chat/completions", {"messages": MESSAGES, "structured_outputs": {"choice": [HALF]}}, "structured_outputs.choice.0"),
        ("/v1/chat/completions", {"messages": MESSAGES, "model": HALF}, "model"),
        ("/v1/chat/completions", {"messages": MESSAGES, HALF: 1}, "\\ud83d"),
        ("/v1/completions", {"prompt": HALF, "echo": True}, "prompt"),
    ],
)  # fmt: skip
def test_a_half_that_would_come_back_is_refused_first(running: Running, path: str, body: dict[str, Any], field: str, stream: bool) -> None:
    answer = asked(running, path, {**body, "stream": stream})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["message"], error["param"]) == (f"{field}: half of a surrogate pair is no character: send the other half too", field)
    assert not running.server.models.loaded, "nothing was loaded for it"


@pytest.mark.parametrize("path", ["/api/show", "/api/create", "/api/chat"])
def test_in_ollamas_words(running: Running, path: str) -> None:
    answer = asked(running, path, {"model": HALF})
    assert (answer.status_code, answer.json()) == (
        400,
        {"error": "model: half of a surrogate pair is no character: send the other half too"},
    )
    bytes_of_it = b'{"model": "\xed\xa0\xbd"}'
    assert running.client.post(path, content=bytes_of_it).status_code == 400
    assert running.client.post(path, content=('{"model": "' + HALF + '"}').encode("utf-16-le", "surrogatepass")).status_code == 400


def test_for_the_model_a_half_is_a_replacement_and_a_whole_is_whole(running: Running) -> None:
    few = {"max_tokens": 1}
    for path, body in (
        ("/v1/chat/completions", {"messages": MESSAGES, **few}),
        ("/v1/completions", {"prompt": HALF, **few}),
        ("/v1/responses", {"input": HALF, "max_output_tokens": 1, "user": "\U0001f600", "metadata": {"\U0001f600": "\U0001f600"}}),
        ("/v1/messages", {"messages": MESSAGES, "system": HALF, **few}),
        ("/api/generate", {"prompt": HALF, "system": HALF, "stream": False, "options": {"num_predict": 1}}),
    ):
        answer = asked(running, path, body)
        assert answer.status_code == 200, answer.text
    halves, replaced = (asked(running, "/tokenize", {"prompt": text}).json()["tokens"] for text in (HALF, "\ufffd"))
    assert halves == replaced
