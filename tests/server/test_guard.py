"""Who may ask, and how much: names, origins, keys, sizes, queues; request ids, health and metrics."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qwen2.server.guard import is_loopback
from qwen2.server.settings import Limits, Settings
from tests.server.conftest import NAME, Running


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:11434", 200), ("localhost", 200), ("LOCALHOST:80", 200), ("[::1]:11434", 200), ("192.168.1.7", 200), ("evil.example", 403),
        ("localhost.evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("", 403), ("[::1", 403), ("@", 403),
    ],
)  # fmt: skip
def test_only_its_own_names_and_addresses_are_answered(running: Running, host: str, status: int) -> None:
    """DNS rebinding: a page elsewhere whose name is made to lead here sends its own name as the host."""
    answer = running.client.get("/v1/models", headers={"Host": host})
    assert answer.status_code == status
    if status == 403:
        assert "is not this server's" in answer.json()["error"]["message"]
        assert running.client.get("/api/tags", headers={"Host": host}).json().keys() == {"error"}


def test_a_name_that_was_allowed(serve: Callable[..., Running]) -> None:
    for allowed in ("models.lan", "Models.Lan"):
        for asked in ("models.lan:11434", "MODELS.LAN"):
            assert serve(hosts=(allowed,)).client.get("/v1/models", headers={"Host": asked}).status_code == 200


def test_pages_elsewhere_may_not_ask(running: Running) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        answer = running.client.get("/v1/models", headers={"Origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
        assert ("--origin" in answer.json()["error"]["message"]) == (origin != "null"), "no page has null to itself"
    with pytest.raises(ValueError, match="--origin null"):
        Settings(origins=("https://app.example", "null"))
    assert running.client.get("/v1/models", headers={"Origin": running.url}).status_code == 200
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert running.client.options("/v1/chat/completions", headers=preflight).status_code == 403


def test_pages_that_were_allowed(serve: Callable[..., Running]) -> None:
    running = serve(origins=("https://app.example",))
    headers = {"Origin": "https://app.example"}
    preflight = {**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = running.client.options("/v1/chat/completions", headers=preflight)
    assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (204, "authorization")
    assert running.client.get("/v1/models", headers=headers).headers["access-control-allow-origin"] == "https://app.example"
    assert running.client.get("/v1/models", headers={"Origin": "https://other.example"}).status_code == 403


def test_a_page_that_may_ask_may_read_refusals(serve: Callable[..., Running]) -> None:
    running = serve(origins=("https://app.example",), api_key="secret", limits=Limits(body_bytes=1000, per_client=0))
    page, key = {"Origin": "https://app.example"}, {"Authorization": "Bearer secret"}
    for status, headers, body in ((401, page, b"{}"), (413, {**page, **key}, b"x" * 2000), (429, {**page, **key}, b"{}")):
        answer = running.client.post("/v1/completions", headers=headers, content=body)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "https://app.example")
        assert answer.headers["access-control-expose-headers"] == "x-request-id, retry-after"
        assert answer.headers["x-request-id"]
    refused = running.client.post("/v1/completions", headers={"Origin": "https://evil.example", **key}, content=b"{}")
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (403, False)


def test_the_key(serve: Callable[..., Running]) -> None:
    running = serve(api_key="secret")
    for path in ("/v1/models", "/metrics", "/api/tags"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret2"}, {"x-api-key": "é"}):
            answer = running.client.get(path, headers={key: value.encode() for key, value in headers.items()})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
    assert running.client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert running.client.get("/v1/models", headers={"Authorization": "bearer secret"}).status_code == 200
    assert running.client.get("/v1/models", headers={"x-api-key": "secret"}).status_code == 200
    assert running.client.get("/health").status_code == 200


def test_without_the_key_health_names_no_model(serve: Callable[..., Running]) -> None:
    running = serve(api_key="secret", load=(NAME,))
    with_key = {"Authorization": "Bearer secret"}
    assert "models" in running.client.get("/health", headers=with_key).json()
    for headers in ({}, {"x-api-key": "wrong"}):
        assert running.client.get("/health", headers=headers).json().keys() == {"status"}


@pytest.mark.parametrize("headers", [{}, {"Authorization": ""}, {"x-api-key": ""}])
def test_no_key_never_passes(serve: Callable[..., Running], headers: dict[str, str]) -> None:
    """Also where a server was started in Python with a key that is empty."""
    assert serve(api_key="").client.get("/v1/models", headers=headers).status_code == 401


def test_bodies_are_bounded_also_without_a_length(serve: Callable[..., Running]) -> None:
    running = serve(limits=Limits(body_bytes=1000))
    large = json.dumps({"model": NAME, "prompt": "x" * 2000}).encode()
    head = {"content-type": "application/json"}
    answer = running.client.post("/v1/completions", content=large, headers=head)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    in_pieces = running.client.post("/v1/completions", content=iter([large[:900], large[900:]]), headers=head)
    assert (in_pieces.status_code, in_pieces.json()["error"]["code"]) == (413, "too_large")


def test_who_sends_far_too_much_hears_so(running: Running) -> None:
    """And finds no broken connection: what it was sending is read away."""
    for _ in range(5):
        answer = running.client.post("/v1/completions", content=b" " * (running.server.settings.limits.body_bytes + 1))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert running.chat(max_tokens=1).status_code == 200


def test_a_full_queue_says_when_to_come_again(serve: Callable[..., Running]) -> None:
    running = serve(limits=Limits(queue=4, per_client=100))
    running.chat(max_tokens=1)
    engine = running.server.models.loaded[NAME].llm.engine
    with ThreadPoolExecutor(12) as pool, engine.lock:  # nothing moves
        waiting = [pool.submit(running.chat, max_tokens=3) for _ in range(4)]
        while len(engine.inbox) < 4:
            pass
        refused = list(pool.map(lambda _: running.chat(max_tokens=3), range(3)))
    assert [answer.status_code for answer in refused] == [429] * 3
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert [future.result().status_code for future in waiting] == [200] * 4


def test_one_client_does_not_take_all_places(serve: Callable[..., Running]) -> None:
    running = serve(limits=Limits(per_client=2))
    running.chat(max_tokens=1)
    engine = running.server.models.loaded[NAME].llm.engine
    with ThreadPoolExecutor(4) as pool, engine.lock:
        waiting = [pool.submit(running.chat, max_tokens=3) for _ in range(2)]
        while len(engine.inbox) < 2:
            pass
        assert running.chat(max_tokens=3).status_code == 429
        assert running.client.get("/health").status_code == 200
    assert [future.result().status_code for future in waiting] == [200] * 2


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_a_body_is_json_whatever_it_is_called(running: Running, kind: str | None) -> None:
    """`curl -d` names a form, and LiteLLM's Ollama providers name nothing."""
    for path, body in (
        ("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 1}),
        ("/api/generate", {"model": NAME, "prompt": "a", "stream": False, "options": {"num_predict": 1}}),
    ):
        answer = running.client.post(path, content=json.dumps(body).encode(), headers={} if kind is None else {"content-type": kind})
        assert answer.status_code == 200, answer.text
    elsewhere = {"content-type": kind or "text/plain", "origin": "https://evil.example"}
    assert running.client.post("/api/generate", content=json.dumps(body).encode(), headers=elsewhere).status_code == 403


def test_request_ids(running: Running) -> None:
    assert running.client.get("/health", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    ids = {running.client.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert running.client.get("/health", headers={"X-Request-ID": "x" * 1000}).headers["x-request-id"].startswith("req-")


def test_no_answer_tells_of_paths(running: Running) -> None:
    for path in ("/v1/models/..%2f..%2fetc%2fpasswd", "/nope", "/v1/models/" + "a" * 300):
        answer = running.client.get(path)
        assert answer.status_code == 404
        assert "/root" not in answer.text
        assert "/tmp" not in answer.text


def test_metrics(running: Running) -> None:
    running.chat(max_tokens=5, temperature=0, logit_bias={"511": -100, "509": -100})
    running.chat(max_tokens=5, temperature=0, logit_bias={"511": -100, "509": -100})
    families = {family.name: family for family in text_string_to_metric_families(running.client.get("/metrics").text)}

    def value(name: str, **labels: str) -> float:
        (found,) = [
            s.value
            for s in families[name].samples
            if s.name in (name, f"{name}_total", f"{name}_count") and labels.items() <= s.labels.items()
        ]
        return found

    assert value("qwen2_completion_tokens", model=NAME) == 10
    assert value("qwen2_requests", model=NAME, reason="length") == 2
    assert value("qwen2_time_to_first_token_seconds", model=NAME) == 2
    assert value("qwen2_cached_tokens", model=NAME) == value("qwen2_prefix_tokens_hit", model=NAME) > 0
    assert value("qwen2_running", model=NAME) == value("qwen2_waiting", model=NAME) == 0
    assert value("qwen2_cache_blocks_used", model=NAME) >= 1


def test_refusals_are_counted_by_route(serve: Callable[..., Running]) -> None:
    running = serve(api_key="secret", limits=Limits(body_bytes=1000))
    key = {"Authorization": "Bearer secret"}
    for path in ("/v1/models/a", "/v1/models/b", "/nope/1", "/nope/2"):
        running.client.get(path, headers=key)
    running.client.get("/v1/models/a")
    running.client.post("/v1/completions", headers=key, content=b"x" * 2000)
    running.client.post("/v1/completions", headers=key, json={"model": NAME, "prompt": "a", "odd": 1})
    running.client.post("/v1/completions", headers=key, json={"model": NAME, "prompt": "a", "max_tokens": 1})
    text = running.client.get("/metrics", headers=key).text
    (family,) = [family for family in text_string_to_metric_families(text) if family.name == "qwen2_http_responses"]
    counts = {(s.labels["path"], s.labels["status"]): s.value for s in family.samples if s.name == "qwen2_http_responses_total"}
    assert counts == {
        ("/v1/models/{name}", "404"): 2, ("/v1/models/{name}", "401"): 1, ("other", "404"): 2,
        ("/v1/completions", "413"): 1, ("/v1/completions", "400"): 1, ("/v1/completions", "200"): 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.8.8", True), ("0.0.0.0", False), ("::", False), ("pc.lan", False)],
)
def test_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_rubbish_on_the_wire_is_answered_or_cut_off(running: Running) -> None:
    port = int(running.url.rpartition(":")[2])
    for rubbish in (
        b"\x00" * 100,
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(rubbish)
            connection.shutdown(socket.SHUT_WR)
            assert b"500" not in connection.recv(1000)[:20]
    assert running.client.get("/health").status_code == 200


def test_the_specification_is_served(running: Running) -> None:
    paths: dict[str, Any] = running.client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/health"} <= paths.keys()
