"""Models that are larger than the memory there is: unused ones go, those that cannot fit are refused, and nobody is given up in vain."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.conftest import NAME, Running
from tests.server.test_gone import until

TWO = "tiny:two"


def size(running: Running, name: str) -> int:
    return running.server.models.store.get(name).size


def ask(running: Running, name: str) -> httpx.Response:
    return running.post("/v1/completions", model=name, prompt="a", max_tokens=2)


@pytest.fixture
def thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded has so many bytes."""
    monkeypatch.setattr("qwen2.server.models._memory", lambda engine: 1000)


def test_one_that_cannot_fit_is_refused_in_a_line_with_sizes_and_others_stay(running: Running, thousand: None) -> None:
    assert ask(running, NAME).status_code == 200
    running.server.models._free = lambda: size(running, TWO) - 1001
    answer = ask(running, TWO)
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert error["code"] == "model_too_large"
    assert error["message"].startswith(f"{TWO} does not fit: its weights take 0.00 GB and 0.00 GB of memory could be free for it")
    assert set(running.server.models.loaded) == {NAME}
    assert ask(running, NAME).status_code == 200


def test_an_unused_one_goes_for_one_that_then_fits(running: Running, thousand: None) -> None:
    assert ask(running, NAME).status_code == 200
    running.server.models._free = lambda: size(running, TWO) - 1000
    assert ask(running, TWO).status_code == 200
    assert set(running.server.models.loaded) == {TWO}, "though there are places for two"
    running.server.models._free = lambda: size(running, NAME)
    assert ask(running, NAME).status_code == 200
    assert set(running.server.models.loaded) == {NAME, TWO}


def test_one_that_is_used_is_waited_for(running: Running, thousand: None) -> None:
    assert ask(running, NAME).status_code == 200
    models = running.server.models
    models._free = lambda: size(running, TWO) - 1
    engine = models.loaded[NAME].llm.engine
    with ThreadPoolExecutor(2) as pool:
        with engine.lock:  # nothing moves
            first = pool.submit(ask, running, NAME)
            until(lambda: len(engine.inbox) == 1)
            second = pool.submit(ask, running, TWO)
            until(lambda: running.server.answers == 2)
            assert set(models.loaded) == {NAME}
        assert [first.result().status_code, second.result().status_code] == [200, 200]
    assert set(models.loaded) == {TWO}


def test_the_cache_is_bounded_by_what_is_free_and_the_log_says_so(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qwen2.server")
    running = serve()
    block = 0
    for name, free in ((NAME, 0), (TWO, 80)):
        monkeypatch.setattr("qwen2.server.loading.free_memory", lambda device, free=free * block: free)
        assert ask(running, name).status_code == 200
        engine = running.server.models.loaded[name].llm.engine
        block = engine.runner.memory.block_bytes
    limits = [running.server.models.loaded[name].llm.engine.cache.pool.limit for name in (NAME, TWO)]
    assert limits[0] == 16, "one window at least"
    assert limits[1] == (80 - (16 - 1)) // 2, "what the other may still take is not free"
    assert f"{NAME}: keys and values of at most 1,024 tokens" in caplog.text
    metrics = running.client.get("/metrics").text
    assert f'qwen2_cache_blocks_limit{{model="{NAME}"}} 16.0' in metrics
