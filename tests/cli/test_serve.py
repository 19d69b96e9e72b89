"""`qwen2 serve`: what it refuses before anything is loaded, and that it serves, is ended and says where it is."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from qwen2 import __version__
from qwen2.cli.app import main
from qwen2.cli.client import headers_of
from qwen2.cli.listener import who
from qwen2.cli.serve import Flags, check_device, settings_of
from qwen2.server.settings import Limits, seconds
from qwen2.weights.store import Store

Out = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others could use this server; give it --api-key KEY, or say --open if that is meant"),
        (["--port", "70000"], "--port 70000: must be from 0 (any free one) to 65,535"),
        (["--max-batch", "0"], "--max-batch 0: must be at least 1"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--context", "0"], "--context 0: must be at least 1"),
        (["--max-queue", "0"], "--max-queue 0: must be at least 1"),
        (["--max-per-client", "-1"], "--max-per-client -1: must be at least 1"),
        (["--max-body-mb", "0"], "--max-body-mb 0: must be at least 1"),
        (["--cache-gb", "-1"], "--cache-gb -1: must be above 0"),
        (["--cache-gb", "nan"], "--cache-gb nan: must be above 0"),
        (["--device", "tpu"], "--device tpu: must be cpu, cuda or cuda:N"),
        (["--device", "cpu:1"], "--device cpu:1: must be cpu, cuda or cuda:N"),
        (["--load", "a:b", "--load", "c:d", "--max-loaded", "1"], "--load is given 2 times and --max-loaded is 1: raise it"),
        (["--load", "qwen2:7b"], "qwen2:7b is not pulled yet: run qwen2 pull qwen2:7b"),
        (
            ["--draft", "x", "--device", "cuda"],
            "--draft with --device cuda: guesses are checked by the CPU's kernels; leave one of them out",
        ),
        (["--draft", "qwen2:9b"], "qwen2 has no tag '9b'; its tags: "),
        (["--origin", "null"], "--origin null: files and sandboxed frames of any page have that origin"),
        (["--keep-alive", "soon"], "'soon': write a time as 90, 10m or 1h30m; -1 is for good"),
    ],
)
def test_refusals(flags: list[str], message: str, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN2_API_KEY", raising=False)
    monkeypatch.setenv("QWEN2_HOME", "nowhere")
    assert main(["serve", *flags]) == 1
    assert capsys.readouterr().err.startswith(f"qwen2: {message}")


@pytest.mark.parametrize("variable", ["", " "])
def test_an_empty_key_is_none(variable: str, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would let everybody in who sends none."""
    monkeypatch.setenv("QWEN2_API_KEY", variable)
    with pytest.raises(ValueError, match=r"^--host 0\.0\.0\.0: others could use this server"):
        settings_of(Flags(host="0.0.0.0"))
    assert settings_of(Flags()).api_key is None
    assert headers_of() == {}
    monkeypatch.setenv("QWEN2_API_KEY", "secret")
    assert settings_of(Flags(host="0.0.0.0")).api_key == "secret"
    assert main(["serve", "--host", "0.0.0.0", "--api-key", variable]) == 1
    assert capsys.readouterr().err == "qwen2: --api-key is empty, which everybody knows: give it a key, or leave it out\n"


def test_a_device_that_torch_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_device("cpu")
    with pytest.raises(ValueError, match=r"^--device cuda: torch finds no such device here"):
        check_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_device("cuda:1")
    with pytest.raises(ValueError, match=r"^--device cuda:2: there are 2, the last is cuda:1$"):
        check_device("cuda:2")


def test_limits_are_flags() -> None:
    assert settings_of(Flags()).limits == Limits()
    limits = settings_of(Flags(max_queue=2, max_per_client=1, max_body_mb=3)).limits
    assert limits == Limits(queue=2, per_client=1, body_bytes=3 * 1024 * 1024)


def test_a_port_that_is_taken_is_named(capsys: Out) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    name = Path("/proc/self/comm").read_text().strip()
    assert error.startswith(f"qwen2: port {port} at 127.0.0.1 is taken by another program, process {os.getpid()} ({name}) (")
    assert error.endswith("); end it, or take another with --port\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("90", 90.0), ("90s", 90.0), ("250ms", 0.25), ("10m", 600.0), ("2h", 7200.0), ("0", 0.0), ("-1", None), ("-1m", None),
        ("1h30m", 5400.0), ("1m30s", 90.0), ("1.5h", 5400.0), ("2000us", 0.002), ("-1h30m", None), ("9000h", None),
    ],
)  # fmt: skip
def test_times(text: str, value: float | None) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["nan", "inf", "1e400", "", "-", "1h 30m", "30 m", "h", "1d", "9" * 400])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="as 90, 10m or 1h30m; -1 is for good"):
        seconds(text)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def answering(path_of: dict[str, tuple[int, str, str]]) -> Iterator[int]:
    """A program that is not ours, with these answers: status, kind and text."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, text = path_of.get(self.path, (404, "text/plain", "none"))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


JSON = "application/json"
OURS = '{"error": {"message": "this server wants its key: send Authorization: Bearer KEY", "code": "invalid_api_key"}}'


@pytest.mark.parametrize(
    ("answers", "key", "told"),
    [
        ({"/": (200, "text/plain", "Ollama is running"), "/api/version": (200, JSON, '{"version": "0.9.1"}')}, None, "Ollama, version 0.9.1"),
        ({"/api/version": (200, JSON, '{"version": "0.9.1"}')}, None, "another program"),
        ({"/qwen2": (200, JSON, '{"program": "qwen2", "version": "9.9"}')}, None, "a server of ours, version 9.9"),
        ({"/qwen2": (401, JSON, OURS)}, None, "a server of ours, which wants its key"),
        ({"/qwen2": (401, JSON, OURS)}, "wrong", "a server of ours, which wants another key"),
        ({"/qwen2": (401, JSON, '{"error": "no"}')}, None, "another program"),
        ({"/qwen2": (200, JSON, "[]"), "/": (200, "text/plain", "Ollama is running"), "/api/version": (200, JSON, "[]")}, None, "another program"),
        ({"/qwen2": (200, JSON, "no JSON")}, None, "another program"),
    ],
)  # fmt: skip
def test_who_has_the_port(answers: dict[str, tuple[int, str, str]], key: str | None, told: str) -> None:
    with answering(answers) as port:
        name = Path("/proc/self/comm").read_text().strip()
        assert who("127.0.0.1", port, key) == f"{told}, process {os.getpid()} ({name})"


def test_a_free_port_is_told_when_it_is_bound_and_a_server_of_ours_is_known(tmp_path: Path, capsys: Out) -> None:
    command = [sys.executable, "-m", "qwen2", "serve", "--port", "0", "--api-key", "secret"]
    process = subprocess.Popen(command, env={**os.environ, "QWEN2_HOME": str(tmp_path)}, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        port = int(re.fullmatch(r"qwen2: serving at http://127\.0\.0\.1:(\d+) \(Ctrl-C ends it\)\n", said)[1])  # type: ignore[index]
        assert port != 0
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=20).json() == {"status": "ok"}
        for key, told in (("secret", f"a server of ours, version {__version__}"), ("other", "a server of ours, which wants another key")):
            assert main(["serve", "--port", str(port), "--api-key", key]) == 1
            assert f"is taken by {told}, process {process.pid} (" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait(20)


@contextmanager
def served(home: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and where it is."""
    port = free_port()
    command = [sys.executable, "-m", "qwen2", "serve", "--port", str(port), *flags]
    process = subprocess.Popen(command, env={**os.environ, "QWEN2_HOME": str(home)}, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                httpx.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.wait(20)


def test_it_finishes_what_it_writes_when_it_is_told_to_end(tmp_path: Path, tiny_folder: Path) -> None:
    Store(tmp_path / "home").copy(str(tiny_folder), "tiny:one")
    body = {
        "model": "tiny:one",
        "prompt": "abc",
        "max_tokens": 400,
        "temperature": 1,
        "seed": 1,
        "stream": True,
        "logit_bias": {"511": -100, "509": -100},
    }
    with served(tmp_path / "home") as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        said = process.stderr.read()
        assert said.startswith(f"qwen2: serving at {url} (Ctrl-C ends it)\n")
        assert "POST /v1/completions 200" in said
        assert "Traceback" not in said


def test_a_killed_server_leaves_the_store_whole(tmp_path: Path, tiny_folder: Path) -> None:
    store = Store(tmp_path / "home")
    store.copy(str(tiny_folder), "tiny:one")
    before = [(model.name, model.digest) for model in store.list()]
    with served(tmp_path / "home") as (process, url):
        assert (
            httpx.post(f"{url}/v1/completions", json={"model": "tiny:one", "prompt": "a", "max_tokens": 3}, timeout=60).status_code == 200
        )
        process.kill()
        process.wait(20)
    assert [(model.name, model.digest) for model in store.list()] == before
    with served(tmp_path / "home") as (_, url):
        assert (
            httpx.post(f"{url}/v1/completions", json={"model": "tiny:one", "prompt": "a", "max_tokens": 3}, timeout=60).status_code == 200
        )
    assert store.remove("tiny:one") >= 0  # nobody holds it any more


def test_what_is_in_memory_and_how_it_goes(tmp_path: Path, tiny_folder: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path / "home").copy(str(tiny_folder), "tiny:one")
    with served(tmp_path / "home", "--api-key", "secret") as (_, url):
        assert main(["ps", "--at", url]) == 1
        assert "this server wants its key" in capsys.readouterr().err
        monkeypatch.setenv("QWEN2_API_KEY", "secret")
        assert main(["ps", "--at", url]) == 0
        assert capsys.readouterr().out == "no model is in memory\n"
        monkeypatch.setenv("QWEN2_SERVER", url.removeprefix("http://"))
        assert main(["stop", "tiny:one"]) == 0
        assert capsys.readouterr().out == "tiny:one: was not in memory\n"
        headers = {"Authorization": "Bearer secret"}
        httpx.post(f"{url}/api/generate", json={"model": "tiny:one", "stream": False}, headers=headers, timeout=60).raise_for_status()
        assert main(["ps"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["NAME", "SIZE", "DEVICE", "CONTEXT", "STAYS"]
        assert lines[1].startswith("tiny:one")
        assert main(["stop", "tiny:one"]) == 0
        assert capsys.readouterr().out == "tiny:one: unloaded\n"
        assert main(["stop", "tiny:none"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"qwen2: the server at {url.removeprefix('http://')} says: model 'tiny:none' is not here")
        assert error.endswith("; GET /v1/models lists those that are\n"), "its words alone, and not the JSON around them"


def test_where_no_server_is(capsys: Out) -> None:
    port = free_port()
    assert main(["ps", "--at", f"127.0.0.1:{port}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"qwen2: no server answers at 127.0.0.1:{port} (")
    assert error.endswith("start one with qwen2 serve, or say where it is with --at\n")
