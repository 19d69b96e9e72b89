"""The page's files over a real socket: what is served, to whom, and under which headers."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable
from importlib.resources import files

import pytest

from tests.server.conftest import Running

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def raw(running: Running, target: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
    """What a client gets that does not tidy its paths."""
    name, _, port = running.url.removeprefix("http://").partition(":")
    with socket.create_connection((name, int(port)), timeout=30) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nAccept: text/html\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_a_browser_gets_the_page_and_a_client_of_ollama_its_sentence(running: Running) -> None:
    page = running.client.get("/", headers=HTML)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.content == (files("qwen2.server") / "web" / "index.html").read_bytes()
    for method in ("GET", "HEAD"):
        for headers in ({"Accept": "*/*"}, {"Accept": "application/json"}):
            probe = running.client.request(method, "/", headers=headers)
            assert (probe.status_code, probe.headers["content-type"]) == (200, "text/plain; charset=utf-8")
            assert probe.text == ("Ollama is running" if method == "GET" else "")
    assert page.headers["vary"] == probe.headers["vary"] == "Accept"
    assert running.client.head("/", headers=HTML).headers["content-length"] == str(len(page.content))


def test_every_file_of_the_package_has_its_type_and_the_page_loads_nothing_from_elsewhere(running: Running) -> None:
    root = files("qwen2.server") / "web"
    manifest = json.loads((root / "vendor" / "manifest.json").read_text("utf-8"))
    kinds = {
        "js": "text/javascript; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "woff2": "font/woff2",
        "mjs": "text/javascript; charset=utf-8",
    }
    seen = set()
    for package in manifest["packages"]:
        for name, one in package["files"].items():
            ending = name.rpartition(".")[2]
            if ending not in kinds:
                continue
            answer = running.client.get(f"/web/vendor/{package['folder']}/{name}")
            assert (answer.status_code, answer.headers["content-type"]) == (200, kinds[ending])
            assert hashlib.sha256(answer.content).hexdigest() == one["sha256"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            seen.add(ending)
    assert {"js", "css", "woff2"} <= seen
    policy = dict(
        part.strip().split(" ", 1) for part in running.client.get("/", headers=HTML).headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not any("unsafe" in value or "http" in value for value in policy.values())


def test_a_kept_copy_is_asked_about_and_not_sent_again(running: Running) -> None:
    first = running.client.get("/", headers=HTML)
    assert first.headers["cache-control"] == "no-cache"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = running.client.get("/", headers={**HTML, "If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
        assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert running.client.get("/", headers={**HTML, "If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "target",
    [
        "/web/../page.py", "/web/%2e%2e/page.py", "/web/..%2fpage.py", "/web/..%5cpage.py", "/web//etc/passwd", "/web/%2fetc%2fpasswd", "/web/",
        "/web/vendor", "/web/vendor/../../app.py", "/web/index.html/", "/web/index.html%00.js", "/web/./index.html", "/web/INDEX.HTML",
        "/page.py", "//etc/passwd", "/../../etc/passwd",
    ],
)  # fmt: skip
def test_no_path_leads_out(running: Running, target: str) -> None:
    status, body = raw(running, target)
    assert status == 404
    assert json.loads(body)["error"]["message"].startswith("GET ")


def test_the_page_needs_no_key_and_keeps_to_the_server_s_names(serve: Callable[..., Running]) -> None:
    running = serve(api_key="secret")
    assert running.client.get("/", headers=HTML).status_code == 200
    assert running.client.get("/web/index.html").status_code == 200
    assert running.client.get("/api/tags").status_code == 401
    assert running.client.post("/web/index.html").status_code == 405
    assert raw(running, "/", host="evil.example")[0] == 403
    assert running.client.get("/", headers={**HTML, "Origin": "https://evil.example"}).status_code == 403
