"""Forms that are new to a server: each is tried once, few at a time, and nobody who asks for none waits for that."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qwen2.engine import grammar as grammar_module
from qwen2.engine.constraint import ConstraintError
from qwen2.server import trials as trials_module
from qwen2.server.trials import AT_ONCE
from tests.server.conftest import NAME, Running
from tests.server.test_gone import asking, until


class Tried:
    """In place of the processes that try: they wait, and those of a grammar with a z fail."""

    def __init__(self) -> None:
        self.go, self.lock = threading.Event(), threading.Lock()
        self.count, self.now, self.most = Counter[str](), 0, 0

    def __call__(self, kind: str, grammar: str) -> None:
        with self.lock:
            self.count[grammar] += 1
            self.now += 1
            self.most = max(self.most, self.now)
        assert self.go.wait(30)
        with self.lock:
            self.now -= 1
        if "z" in grammar:
            raise ConstraintError(f"{kind}: not compiled")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Tried:
    found = Tried()
    monkeypatch.setattr(grammar_module, "_try", found)
    return found


def formed(running: Running, regex: str) -> Any:
    return running.chat(max_tokens=2, response_format={"type": "regex", "regex": regex})


def test_a_form_that_does_not_compile_is_tried_once(running: Running, tried: Tried) -> None:
    tried.go.set()
    answers = [formed(running, "[ab]z") for _ in range(3)]
    assert {(answer.status_code, answer.json()["error"]["message"]) for answer in answers} == {(400, "regex: not compiled")}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"z": {}}}}}
    texts = {running.chat(tools=[tool], tool_choice="required").json()["error"]["message"] for _ in range(3)}
    assert texts == {"tool 'f': its parameters: call: not compiled"} or len(texts) == 1
    assert sorted(tried.count.values()) == [1, 1, 1], "the calls together, and the tool alone"


def test_a_crowd_of_new_forms_keeps_nobody_out(running: Running, tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials_module, "MOST", 6)
    assert running.chat(max_tokens=1).status_code == 200
    trials = running.server.trials
    with ThreadPoolExecutor(20) as pool:
        new = [pool.submit(formed, running, f"[ab]{number}") for number in range(6)]
        until(lambda: len(trials._going) == 6)
        same = [pool.submit(formed, running, "[ab]0") for _ in range(8)]
        until(lambda: sum(trials._wanting.values()) == 14)
        refused = formed(running, "[ab]6")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert "6 forms that are new here" in refused.json()["error"]["message"]
        assert running.chat(max_tokens=1).status_code == 200, "while all of them wait"
        assert running.client.get("/api/tags").status_code == 200
        tried.go.set()
        assert [one.result().status_code for one in new + same] == [200] * 14
    assert tried.most == AT_ONCE
    assert set(tried.count.values()) == {1}
    assert formed(running, "[ab]0").status_code == 200
    assert set(tried.count.values()) == {1}
    assert not trials._going
    assert not trials._wanting


def test_a_form_whose_client_has_gone_is_not_tried(running: Running, tried: Tried) -> None:
    assert running.chat(max_tokens=1).status_code == 200
    trials = running.server.trials
    with ThreadPoolExecutor(AT_ONCE) as pool:
        first = [pool.submit(formed, running, f"[ab]{number}") for number in range(AT_ONCE)]
        until(lambda: tried.now == AT_ONCE)
        with asking(running, NAME, response_format={"type": "regex", "regex": "[ab]gone"}):
            until(lambda: len(trials._going) == AT_ONCE + 1)
        until(lambda: sum(trials._wanting.values()) == AT_ONCE)
        tried.go.set()
        assert [one.result().status_code for one in first] == [200] * AT_ONCE
    until(lambda: not trials._going)
    assert not any("gone" in grammar for grammar in tried.count)


def test_what_keeps_forms_from_being_tried_is_not_their_fault(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str, grammar: str) -> None:
        raise OSError("no process starts: /secret")

    with monkeypatch.context() as context:
        context.setattr(grammar_module, "_try", broken)
        refused = formed(running, "[ab]x")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "secret" not in refused.text
    assert formed(running, "[ab]x").status_code == 200
