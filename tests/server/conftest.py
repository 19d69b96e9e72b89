"""A real server on a free port, with tiny models under the names of a store of its own; checked after every test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from qwen2 import LLM
from qwen2.config import tiny
from qwen2.server.app import Server, create_app
from qwen2.server.settings import Settings
from qwen2.weights.export import to_hf_folder
from qwen2.weights.store import Store
from tests.conftest import tiny_model

NAME = "tiny:one"


@pytest.fixture(scope="session")
def llm(home: Path) -> LLM:
    """The first model without a server."""
    return LLM(Store(home).find(NAME))


@dataclass
class Running:
    """A server, and how to ask it."""

    url: str
    server: Server
    client: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def chat(self, content: str = "Hello", **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", model=NAME, messages=[{"role": "user", "content": content}], **body)

    def settle(self) -> None:
        """Wait until no engine has anything to do and every model was let go, and check the accounts."""
        for loaded in list(self.server.models.loaded.values()):
            begin = time.monotonic()
            while loaded.users and time.monotonic() - begin < 20:  # the last byte is read a moment before the model is let go
                time.sleep(0.01)
            loaded.llm.engine.settle()
            loaded.llm.engine.check()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two models that differ in their weights."""
    folder = tmp_path_factory.mktemp("served")
    store = Store(folder / "home")
    for seed, name in enumerate((NAME, "tiny:two")):
        to_hf_folder(tiny_model(tiny(context=1024), seed), folder / f"model{seed}")
        store.copy(str(folder / f"model{seed}"), name)
    return folder / "home"


@pytest.fixture
def serve(home: Path) -> Iterator[Callable[..., Running]]:
    """Start a server with these settings; at the test's end it is told to stop, and has to."""
    started: list[tuple[uvicorn.Server, threading.Thread, Running]] = []

    def start(**settings: Any) -> Running:
        app = create_app(Settings(port=0, **settings), Store(home))
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=10))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        running = Running(url, app.state.server, httpx.Client(base_url=url, timeout=60))
        started.append((server, thread, running))
        return running

    yield start
    for server, thread, running in started:
        running.settle()
        assert all(loaded.users == 0 for loaded in running.server.models.loaded.values())
        running.client.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def running(serve: Callable[..., Running]) -> Running:
    return serve()


@pytest.fixture
def openai_client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
