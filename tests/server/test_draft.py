"""A server with a draft: models of the same tokens have it, others are served without, and what it guessed is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2 import LLM, SamplingParams, kernels
from qwen2.config import tiny
from qwen2.weights.export import to_hf_folder
from qwen2.weights.model import load
from qwen2.weights.store import Store
from tests.conftest import tiny_model
from tests.server.conftest import NAME, Running

pytestmark = pytest.mark.skipif(kernels.isa() is None, reason="this installation has no kernels for this processor")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a model and a smaller one."""
    folder = tmp_path_factory.mktemp("drafted")
    store = Store(folder / "home")
    for layers, name in ((2, NAME), (1, "tiny:small")):
        to_hf_folder(tiny_model(tiny(context=1024, layers=layers)), folder / f"model{layers}")
        store.copy(str(folder / f"model{layers}"), name)
    return folder / "home"


def test_the_text_is_the_same_and_guesses_are_counted(
    serve: Callable[..., Running], home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qwen2.engine.draft.CHECK", 0.0)  # models of random weights are sure of nothing
    running = serve(draft="tiny:small")
    body: dict[str, Any] = {"prompt": "the quick", "temperature": 0, "max_tokens": 80, "repetition_penalty": 1.3}
    text = running.post("/v1/completions", model=NAME, **body).json()["choices"][0]["text"]
    plain = LLM(Store(home).find(NAME), guesses=0)
    assert text == plain.generate(["the quick"], SamplingParams(temperature=0, max_tokens=80, repetition_penalty=1.3))[0].text
    engine = running.server.models.loaded[NAME].llm.engine
    assert engine.drafted > 0
    metrics = running.client.get("/metrics").text
    assert f'qwen2_drafted_tokens_total{{model="{NAME}"}} {float(engine.drafted)}' in metrics
    assert f'qwen2_drafted_right_tokens_total{{model="{NAME}"}} {float(engine.drafted_right)}' in metrics
    assert f'qwen2_cache_bytes{{model="{NAME}"}} {float(engine.cache_bytes):.10g}'.split(" ")[0] in metrics
    assert running.post("/v1/completions", model="tiny:small", prompt="a", max_tokens=2).status_code == 200
    assert running.server.models.loaded["tiny:small"].llm.draft is None


def test_its_weights_are_in_memory_once_and_are_loaded_only_for_models_it_can_guess_for(
    serve: Callable[..., Running], home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loads: list[str] = []

    def watched(name: str, **values: Any) -> Any:
        loads.append(name)
        return load(name, **values)

    monkeypatch.setattr("qwen2.server.loading.load", watched)
    store = Store(home)
    to_hf_folder(tiny_model(tiny(context=1024), 7), home.parent / "other")
    store.copy(str(home.parent / "other"), "tiny:other")
    running = serve(draft="tiny:small", max_loaded=4)
    for name in ("tiny:small", NAME, "tiny:other"):
        assert running.post("/v1/completions", model=name, prompt="a", max_tokens=2).status_code == 200
    assert loads == ["tiny:small", NAME, "tiny:other"], "the draft is the model that is served"
    loaded = running.server.models.loaded
    small = loaded["tiny:small"].llm.model.network
    assert [loaded[name].llm.draft.network is small for name in (NAME, "tiny:other")] == [True, True]
    listed = {one["name"]: one for one in running.client.get("/api/ps").json()["models"]}
    engine = loaded[NAME].llm.engine
    assert listed[NAME]["size"] == engine.runner.network.weight_bytes() + small.weight_bytes() + engine.cache_bytes
    for name in ("tiny:small", NAME):
        assert running.post("/qwen2/stop", model=name).json()["unloaded"]
    assert running.post("/v1/completions", model="tiny:small", prompt="a", max_tokens=2).status_code == 200
    assert loaded["tiny:small"].llm.model.network is small, "and the model is the draft"
    assert len(loads) == 3
    del small, engine, loaded
    assert running.post("/qwen2/stop", model="tiny:other").json()["unloaded"]
    monkeypatch.setattr("qwen2.tokenizer.Tokenizer.same_tokens", lambda *_: False)
    assert running.post("/qwen2/stop", model="tiny:small").json()["unloaded"]
    assert running.post("/v1/completions", model=NAME, prompt="a", max_tokens=2).status_code == 200
    assert loads == ["tiny:small", NAME, "tiny:other", NAME], "it is not loaded for one that it cannot guess for"
    assert f"the draft tiny:small has other tokens than {NAME}: served without it" in caplog.text
