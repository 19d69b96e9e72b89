"""Models of the same weights in one server: the weights are in memory once, everything else is each model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qwen2 import LLM, SamplingParams
from qwen2.weights.modelfile import parse
from qwen2.weights.store import Store
from tests.server.conftest import NAME, Running
from tests.server.test_gone import loads_of

MADE = "mine:mario"
OTHER = "mine:luigi"
HELLO = [{"role": "user", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "You are Mario."}
LONG = {"role": "user", "content": "word " * 60}


@pytest.fixture(autouse=True)
def made(home: Path) -> Iterator[None]:
    store = Store(home)
    store.create(MADE, parse(f"FROM {NAME}\nSYSTEM You are Mario.\nPARAMETER num_predict 7\nPARAMETER temperature 0"))
    store.create(OTHER, parse(f'FROM {MADE}\nTEMPLATE """{{% for m in messages %}}{{{{ m.content }}}}\n{{% endfor %}}"""'))
    yield
    for name in (MADE, OTHER):
        if store.has(name):
            store.remove(name)


def text(running: Running, name: str, messages: list[dict[str, str]] = HELLO, **body: Any) -> str:
    answer = running.post("/v1/chat/completions", model=name, messages=messages, temperature=0, **body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def listed(running: Running) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in running.client.get("/api/ps").json()["models"]}


@pytest.mark.parametrize("first", [NAME, MADE])
def test_weights_are_in_memory_once_and_settings_are_each_models_own(running: Running, llm: LLM, first: str) -> None:
    names = [first, MADE if first == NAME else NAME, OTHER]
    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(names, pool.map(lambda name: text(running, name, max_tokens=7), names), strict=True))
    greedy = SamplingParams(temperature=0, max_tokens=7)
    assert found[NAME] == llm.chat(HELLO, greedy).text
    assert found[MADE] == llm.chat([SYSTEM, *HELLO], greedy).text
    assert found[OTHER] == llm.generate("You are Mario.\nHello\n", greedy)[0].text
    assert len(set(found.values())) == 3
    loaded = running.server.models.loaded
    assert len({id(one.llm.model.network) for one in loaded.values()}) == len({id(one.llm.engine) for one in loaded.values()}) == 1
    counted = running.post("/v1/chat/completions", model=MADE, messages=HELLO, ignore_eos=True)
    assert counted.json()["usage"]["completion_tokens"] == 7, "num_predict is its own"


def test_each_name_comes_and_goes_by_itself(running: Running) -> None:
    assert running.post("/api/chat", model=NAME, messages=[], keep_alive=-1).status_code == 200
    assert running.post("/api/chat", model=MADE, messages=[], keep_alive=90).status_code == 200
    seen = listed(running)
    assert seen[NAME]["expires_at"] is None
    assert seen[MADE]["expires_at"] is not None
    assert (seen[NAME]["shares"], seen[MADE]["shares"]) == ([MADE], [NAME])
    network = running.server.models.loaded[NAME].llm.model.network
    assert running.post("/api/chat", model=NAME, messages=[], keep_alive=0).json()["done_reason"] == "unload"
    assert {name: one["shares"] for name, one in listed(running).items()} == {MADE: []}
    text(running, MADE)
    text(running, NAME)
    assert running.server.models.loaded[NAME].llm.model.network is network, "they stayed for the other"
    assert running.post("/qwen2/stop", model=MADE).json() == {"unloaded": True, "broken_off": 0}
    text(running, NAME)


def test_stopping_one_breaks_off_nothing_of_another(running: Running) -> None:
    for name in (NAME, MADE):
        assert running.post("/qwen2/open", model=name).status_code == 200
    engine = running.server.models.loaded[NAME].llm.engine
    right = text(running, NAME, max_tokens=30, ignore_eos=True)
    with ThreadPoolExecutor(2) as pool:
        with engine.lock:  # nothing moves
            both = [pool.submit(running.post, "/v1/chat/completions", model=name, messages=HELLO, **{"max_tokens": 30, "temperature": 0, "ignore_eos": True})
                    for name in (NAME, MADE)]  # fmt: skip
            while len(engine.inbox) < 2:
                pass
            gauges = running.client.get("/metrics").text
            assert f'qwen2_waiting{{model="{NAME}"}} 1.0' in gauges
            assert f'qwen2_waiting{{model="{MADE}"}} 1.0' in gauges
            assert gauges.count("\nqwen2_cache_bytes{") == 1, "one cache is counted once"
            assert running.post("/qwen2/stop", model=MADE).json() == {"unloaded": True, "broken_off": 1}
        goes_on, broken = (one.result() for one in both)
    assert broken.status_code == 503
    assert goes_on.json()["choices"][0]["message"]["content"] == right


def test_a_prompt_that_one_has_read_is_found_by_the_other(running: Running, llm: LLM) -> None:
    text(running, NAME, [SYSTEM, LONG])
    answer = running.post("/v1/chat/completions", model=MADE, messages=[LONG], temperature=0).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 64
    right = llm.chat([SYSTEM, LONG], SamplingParams(temperature=0, max_tokens=7)).text
    assert answer["choices"][0]["message"]["content"] == right


def test_together_they_take_one_place(serve: Callable[..., Running]) -> None:
    running = serve(max_loaded=1)
    for name in (NAME, MADE, OTHER):
        text(running, name, max_tokens=2)
    assert set(running.server.models.loaded) == {NAME, MADE, OTHER}
    text(running, "tiny:two", max_tokens=2)
    assert set(running.server.models.loaded) == {"tiny:two"}
    text(running, MADE, max_tokens=2)
    assert set(running.server.models.loaded) == {MADE}


def test_weights_are_loaded_once_however_many_names_are_asked_for_at_once(running: Running, home: Path) -> None:
    loads = loads_of(running)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: text(running, name, max_tokens=2), [NAME, MADE, OTHER] * 2))
    assert len(loads) == 1
    Store(home).create(MADE, parse(f"FROM {NAME}\nSYSTEM You are Luigi."))
    for name in (NAME, OTHER):
        assert running.post("/qwen2/stop", model=name).json()["unloaded"]
    luigi = text(running, MADE, max_tokens=7)
    assert luigi == text(running, NAME, [{"role": "system", "content": "You are Luigi."}, *HELLO], max_tokens=7)
    assert len(loads) == 1, "made again of the same weights, which stay"
    Store(home).create(MADE, parse("FROM tiny:two"))
    assert text(running, MADE, max_tokens=7) == text(running, "tiny:two", max_tokens=7)
    assert len(loads) == 2


def test_one_that_is_shared_can_be_removed_from_the_disk(running: Running, home: Path) -> None:
    text(running, MADE)
    text(running, OTHER)
    assert running.client.request("DELETE", "/api/delete", json={"model": MADE}).status_code == 200
    assert not Store(home).has(MADE)
    text(running, OTHER)
    assert set(running.server.models.loaded) == {OTHER}
