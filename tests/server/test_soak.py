"""A crowd at the server (soak.py): nothing leaks, nobody gets another's answer; and a server that is killed amid requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from qwen2.weights.store import Store
from tests.server.conftest import NAME, Running
from tests.server.soak import CACHE, CONTEXT, Soak, block_bytes, essence, served, tiny_home


@pytest.mark.slow
def test_a_crowd(serve: Callable[..., Running], home: Path) -> None:
    soak, cache = Soak(NAME), CACHE * block_bytes(home, NAME)
    running = serve(max_batch=8, context=CONTEXT, cache_bytes=cache)  # little more than one window: answers give way to each other
    asyncio.run(soak.alone(running.url))
    running.settle()
    engine = running.server.models.loaded[NAME].llm.engine
    alone = engine.scheduler.preemptions
    soak.counts.clear()
    asyncio.run(soak.crowd(running.url, range(600)))
    assert soak.counts["answered"] > 300
    assert soak.counts["left"] > 50
    assert soak.counts["refused"] > 50
    running.settle()
    assert engine.scheduler.preemptions > alone
    assert not engine.cache.live
    assert engine.scheduler.idle
    assert running.client.get("/health").status_code == 200


@pytest.mark.slow
def test_a_crowd_at_a_server_of_its_own() -> None:
    """Whose memory does not grow."""
    command = [sys.executable, "-m", "tests.server.soak", "--requests", "1800"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_server_killed_amid_requests_leaves_the_store_whole(tmp_path: Path) -> None:
    """And the one after it answers as the first did."""
    home = tiny_home(tmp_path)
    listed = [(model.name, model.digest) for model in Store(home).list()]
    files = sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if "locks" not in path.parts and "holds" not in path.parts)
    soak = Soak("tiny:one")
    path, body = soak.asked("chat", "a", 0)

    async def kill_in_the_middle(url: str, process: psutil.Process) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            long = {**body, "max_tokens": 900, "logit_bias": {"511": -100, "509": -100}, "stream": True}
            async with client.stream("POST", path, json=long) as answer:
                pieces = answer.aiter_bytes()
                await anext(pieces)  # it is being written
                crowd = [asyncio.ensure_future(soak.answered(client, kind, "b", 0)) for kind in ("chat", "ollama", "embed")]
                copying = asyncio.ensure_future(client.post("/api/copy", json={"source": "tiny:one", "destination": "tiny:two"}))
                process.kill()
                await asyncio.gather(*crowd, copying, return_exceptions=True)
                with contextlib.suppress(httpx.HTTPError):
                    async for _ in pieces:
                        pass

    with served(home) as (url, process, _):
        first = essence("chat", httpx.post(url + path, json=body, timeout=60).json())
        asyncio.run(kill_in_the_middle(url, process))
    store = Store(home)
    if store.has("tiny:two"):  # whole or not at all
        store.remove("tiny:two")
    assert [(model.name, model.digest) for model in store.list()] == listed
    assert files == sorted(
        path.relative_to(home).as_posix() for path in home.rglob("*") if "locks" not in path.parts and "holds" not in path.parts
    )
    with served(home, "--load", "tiny:one") as (url, _, _):
        assert essence("chat", httpx.post(url + path, json=body, timeout=60).json()) == first
    assert store.remove("tiny:one") >= 0  # nobody holds it any more
    assert os.listdir(tmp_path / "model")  # what it stood for is the user's
