"""Pulls that wait or hang: they keep nobody else out, end with their clients and with the server, and never leave one without a last line."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from filelock import FileLock

from qwen2.server.app import create_app
from qwen2.server.ending import Ending
from qwen2.server.progress import ENDING, FAILED, MOST, Works
from qwen2.server.settings import Settings
from qwen2.weights.pull import Progress
from qwen2.weights.registry import ENTRIES
from qwen2.weights.store import Store
from tests.server.conftest import NAME, Running
from tests.server.test_gone import until

NAMES = list(ENTRIES)
PULLED = NAMES[0]


@contextmanager
def elsewhere(home: Path, *names: str) -> Iterator[None]:
    """Another process is pulling these."""
    with ExitStack() as stack:
        for name in names:
            path = home / "locks" / f"{name.replace(':', '--')}.lock"
            path.parent.mkdir(exist_ok=True)
            stack.enter_context(FileLock(path))
        yield


def pulling(stack: ExitStack, url: str, name: str) -> Callable[[], Any]:
    """A client that waits for a pull; gives the next line of what it is told."""
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30))
    body = json.dumps({"model": name})
    connection.sendall(f"POST /api/pull HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    lines = (json.loads(line) for line in stack.enter_context(connection.makefile("rb")) if line.startswith(b"{"))
    return lambda: next(lines)


def test_pulls_that_wait_keep_nobody_out_and_end_with_their_clients(running: Running, home: Path) -> None:
    works = running.server.works
    with elsewhere(home, *NAMES[: MOST + 1]):
        with ExitStack() as clients:
            told = [pulling(clients, running.url, name) for name in NAMES[: MOST + 1] + [PULLED] * 5]
            assert [next_line() for next_line in told] == [{"status": "pulling manifest"}] * len(told)
            for name, next_line in zip(NAMES[:MOST], told, strict=False):
                assert next_line() == {"status": f"another process is pulling {name}: waiting for it"}
            assert told[MOST]() == {"status": f"{MOST} models are being pulled already: waiting for one of them"}
            for next_line in told[MOST + 1 :]:
                assert next_line() == {"status": f"another client has asked for {PULLED}: waiting for that"}
            assert running.chat(max_tokens=1).status_code == 200
            assert NAME in running.client.get("/api/tags").text
            assert running.post("/api/copy", source=NAME, destination=NAME).status_code == 400
            assert works.running.keys() == set(NAMES[:MOST])
        until(lambda: not works.running)
        with ExitStack() as clients:  # the places are free again
            told = [pulling(clients, running.url, name) for name in NAMES[1:3]]
            for name, next_line in zip(NAMES[1:3], told, strict=True):
                assert [next_line(), next_line()][1] == {"status": f"another process is pulling {name}: waiting for it"}
        until(lambda: not works.running)


def test_a_client_that_waits_for_the_last_line_alone_is_missed_too(running: Running, home: Path) -> None:
    with elsewhere(home, PULLED):
        with pytest.raises(httpx.ReadTimeout):
            running.client.post("/api/pull", json={"model": PULLED, "stream": False}, timeout=0.5)
        until(lambda: not running.server.works.running)


def test_a_server_that_ends_waits_for_no_pull(tmp_path: Path) -> None:
    app = create_app(Settings(port=0), Store(tmp_path))
    parts = app.state.server
    server = Ending(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"), parts.models, parts.works, 1000)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with elsewhere(tmp_path, *NAMES[:MOST]), ExitStack() as clients:
        told = [pulling(clients, url, name) for name in NAMES[: MOST + 2]]
        for next_line in told:
            assert "waiting for" in [next_line(), next_line()][1]["status"]
        server.handle_exit(signal.SIGINT, None)
        assert [next_line() for next_line in told] == [ENDING] * len(told)
        thread.join(20)
        assert not thread.is_alive()


def lines_of(works: Works, work: Callable[..., object]) -> list[dict[str, Any]]:
    async def read() -> list[dict[str, Any]]:
        return [line async for line in works.told("made", "a:b", work, lambda progress: {"status": progress.note})]

    return asyncio.run(asyncio.wait_for(read(), 20))


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("/secret"), MemoryError()])
def test_whatever_a_work_ends_with_its_client_hears_of_it(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def work(watch: Callable[[Progress], None]) -> None:
        watch(Progress(0, 0, "begun"))
        watch(Progress(0, 0, "begun"))
        raise error

    works = Works()
    with caplog.at_level(logging.ERROR, "qwen2.server"):
        assert lines_of(works, work) == [{"status": "begun"}, FAILED]
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert not works.running
    assert lines_of(works, lambda watch: None) == [{"status": "success"}]
    assert lines_of(works, lambda watch: Path("/nowhere/at/all").read_bytes())[0]["error"].startswith("[Errno 2]")


def test_a_system_without_threads_leaves_no_place_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one of that name would wait for ever for one that never began."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    works = Works()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert lines_of(works, lambda watch: None) == [FAILED]
    assert not works.running
    assert lines_of(works, lambda watch: None) == [{"status": "success"}]
