"""Models that stay and go: a bug in keeping them ends nothing, and what is in memory is not searched for garbage."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable

import pytest

from qwen2.server import models as models_module
from tests.server.conftest import NAME, Running
from tests.server.test_gone import until


def test_an_exception_in_keeping_models_is_logged_and_keeping_goes_on(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(models_module, "REST", 0.0)
    running = serve(keep_alive=None)
    assert running.chat(max_tokens=1).status_code == 200
    loaded = running.server.models.loaded[NAME]

    def broken() -> None:
        raise ValueError("no vocabulary")

    monkeypatch.setattr(loaded.llm.engine.grammars, "vocabulary", broken)
    with caplog.at_level(logging.ERROR, "qwen2.server"):
        loaded.knows_forms = False
        until(lambda: bool(caplog.records))
    assert caplog.records[0].exc_info is not None
    assert str(caplog.records[0].exc_info[1]) == "no vocabulary"
    loaded.keep_alive = 0.0
    until(lambda: not running.server.models.loaded)


def test_what_is_loaded_is_frozen_and_what_is_unloaded_goes(running: Running) -> None:
    models, before = running.server.models, gc.get_freeze_count()
    assert running.chat(max_tokens=1).status_code == 200
    assert gc.get_freeze_count() > before
    assert running.post("/qwen2/open", model="tiny:two").status_code == 200
    model, other = (weakref.ref(models.loaded[name].llm.model) for name in (NAME, "tiny:two"))
    assert running.post("/qwen2/stop", model=NAME).json()["unloaded"]
    until(lambda: model() is None)
    assert other() is not None
    until(lambda: models._sweeping is not None and not models._sweeping.is_alive())
    assert gc.get_freeze_count() > 0, "one is still in memory"
    assert running.post("/qwen2/stop", model="tiny:two").json()["unloaded"]
    until(lambda: other() is None)
    until(lambda: gc.get_freeze_count() == 0)


def test_a_model_is_loaded_when_what_went_for_it_has_gone(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(max_loaded=1)
    assert running.chat(max_tokens=1).status_code == 200
    models = running.server.models
    first, load, gone = weakref.ref(models.loaded[NAME].llm.model), models._load, []

    def watched(name: str) -> object:
        gone.append(first() is None)
        return load(name)

    monkeypatch.setattr(models, "_load", watched)
    assert running.post("/qwen2/open", model="tiny:two").status_code == 200
    assert gone == [True]
