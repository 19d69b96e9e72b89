"""Adapters by the names of models: one engine, several in one batch, loaded and unloaded as models are, made over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ollama
import pytest

from qwen2 import LLM, SamplingParams
from qwen2.config import tiny
from qwen2.weights.modelfile import parse
from qwen2.weights.store import Store
from tests.conftest import random_adapter
from tests.server.conftest import NAME, Running

NAMES = ("adapted:one", "adapted:two")
HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("adapters")
    return [random_adapter(tiny(), place / f"{seed}", seed=seed, rank=16) for seed in (1, 2)]


@pytest.fixture(autouse=True)
def made(home: Path, folders: list[Path]) -> Iterator[None]:
    store = Store(home)
    for name, folder in zip(NAMES, folders, strict=True):
        store.create(name, parse(f"FROM {NAME}\nADAPTER {folder}"))
    yield
    for name in (*NAMES, "adapted:new"):
        if store.has(name):
            store.remove(name)
    for path in (home / "blobs").glob("*"):  # of what was refused
        path.unlink()


def text(running: Running, name: str, **body: Any) -> str:
    answer = running.post("/v1/chat/completions", model=name, messages=HELLO, temperature=0, max_tokens=12, **body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("first", [NAME, NAMES[1]])
def test_names_in_one_batch(running: Running, llm: LLM, folders: list[Path], first: str) -> None:
    expected = {NAME: llm.chat(HELLO, GREEDY).text}
    for name, folder in zip(NAMES, folders, strict=True):
        expected[name] = llm.beside(adapter=folder).chat(HELLO, GREEDY).text
    assert len(set(expected.values())) == 3
    assert text(running, first) == expected[first]
    asked = [*expected] * 4
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda name: text(running, name), asked)) == [expected[name] for name in asked]
    loaded = running.server.models.loaded
    assert len({id(one.llm.engine) for one in loaded.values()}) == 1
    assert (
        running.post("/api/embed", model=NAMES[0], input="Hello").json()["embeddings"]
        != (running.post("/api/embed", model=NAME, input="Hello").json()["embeddings"])
    )


def test_an_adapter_comes_and_goes_with_its_model(running: Running) -> None:
    text(running, NAME)
    engine = running.server.models.loaded[NAME].llm.engine
    before = engine.weight_bytes
    text(running, NAMES[0])
    text(running, NAMES[1])
    assert engine.weight_bytes - before == sum(running.server.models.loaded[name].llm.adapter.nbytes for name in NAMES)
    for name in NAMES:
        assert running.post("/api/chat", model=name, messages=[], keep_alive=0).json()["done_reason"] == "unload"
    running.settle()
    assert list(running.server.models.loaded) == [NAME]
    assert engine.weight_bytes == before


def test_made_of_uploaded_files(running: Running, llm: LLM, folders: list[Path], home: Path) -> None:
    client = ollama.Client(running.url)
    files = {path.name: client.create_blob(path) for path in folders[0].iterdir()}
    client.create("adapted:new", from_=NAME, adapters=files, system="Be brief")
    stored = Store(home).get("adapted:new")
    assert stored.digest == Store(home).get(NAME).digest
    assert {file.path: f"sha256:{file.sha256}" for file in stored.adapter} == files
    expected = llm.beside(adapter=folders[0]).chat([{"role": "system", "content": "Be brief"}, *HELLO], GREEDY).text
    assert text(running, "adapted:new") == expected
    shown = client.show("adapted:new")
    assert "With an adapter of its own" in (shown.modelfile or "")
    assert str(home) not in str(shown)
    again = running.post("/api/create", model="adapted:other", **{"from": "adapted:new"}, adapters=files, stream=False)
    assert again.status_code == 400
    assert again.json()["error"].startswith("ADAPTER: adapted:new has an adapter already")


def test_another_models_adapter_is_refused(running: Running, tmp_path: Path, home: Path) -> None:
    wide = random_adapter(tiny(hidden=128), tmp_path / "wide")
    client = ollama.Client(running.url)
    files = {path.name: client.create_blob(path) for path in wide.iterdir()}
    answer = running.post("/api/create", model="adapted:new", **{"from": NAME}, adapters=files, stream=False)
    assert answer.status_code == 400
    assert "this model needs" in answer.json()["error"]
    assert str(home) not in answer.text
    assert not Store(home).has("adapted:new")
    digest = hashlib.sha256((wide / "adapter_config.json").read_bytes()).hexdigest()
    assert files["adapter_config.json"] == f"sha256:{digest}"


def test_made_again_with_another_adapter(running: Running, llm: LLM, folders: list[Path], home: Path) -> None:
    """A model in memory whose adapter has changed on the disk is loaded anew when nobody uses it."""
    before = text(running, NAMES[0])
    Store(home).create(NAMES[0], parse(f"FROM {NAME}\nADAPTER {folders[1]}"))
    assert text(running, NAMES[0]) == llm.beside(adapter=folders[1]).chat(HELLO, GREEDY).text != before
