"""A crowd at the server (soak.py): nothing leaks, nobody gets another's answer; and a server that is killed amid requests."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from qwen2.weights.store import Store
from tests.server.conftest import NAME, Running
from tests.server.soak import Soak, essence, served, tiny_home


@pytest.mark.slow
def test_a_crowd(serve: Callable[..., Running]) -> None:
    block = 64 * 2 * 2 * 2 * 16 * 4
    running = serve(max_batch=8, cache_bytes=24 * block)  # little more than one window: answers give way to each other
    soak = Soak(NAME)
    asyncio.run(soak.alone(running.url))
    asyncio.run(soak.crowd(running.url, range(300)))
    running.settle()
    gc.collect()
    before = psutil.Process().memory_info().rss
    soak.counts.clear()
    asyncio.run(soak.crowd(running.url, range(300, 1800)))
    assert soak.counts["answered"] > 900
    assert soak.counts["left"] > 100
    assert soak.counts["refused"] > 100
    running.settle()
    gc.collect()
    engine = running.server.models.loaded[NAME].llm.engine
    assert engine.scheduler.preemptions > 0
    assert not engine.cache.live
    assert engine.scheduler.idle
    assert psutil.Process().memory_info().rss < 1.05 * before + 20e6
    assert running.client.get("/health").status_code == 200


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
