"""Ollama's dialect through its own client and bare requests."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ollama
import pytest

from qwen2 import LLM, SamplingParams, __version__
from qwen2.config import tiny
from qwen2.server.ollama_models import counted
from qwen2.weights import describe
from qwen2.weights.store import Store
from tests.server.conftest import NAME, Running

MESSAGES = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0, "num_predict": 12}


@pytest.fixture
def client(running: Running) -> ollama.Client:
    return ollama.Client(host=running.url)


def test_chat_is_the_engines_answer(client: ollama.Client, llm: LLM) -> None:
    answer = client.chat(NAME, MESSAGES, options=GREEDY)
    right = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=12))
    assert answer.message.content == right.text
    assert (answer.done, answer.done_reason) == (True, right.finish_reason)
    assert (answer.prompt_eval_count, answer.eval_count) == (right.usage.prompt_tokens, right.usage.completion_tokens)
    pieces = list(client.chat(NAME, MESSAGES, options=GREEDY, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == right.text
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_the_whole_duration_has_what_it_waited_for_others(client: ollama.Client, running: Running) -> None:
    client.chat(NAME, [])
    engine = running.server.models.loaded[NAME].llm.engine
    with ThreadPoolExecutor(2) as pool:
        with engine.lock:  # no step is taken
            asked = pool.submit(client.chat, NAME, MESSAGES, options=GREEDY)
            embedding = pool.submit(client.embed, NAME, "Hello")
            while len(engine.inbox) < 2:
                time.sleep(0.001)
            begin = time.perf_counter_ns()
            while (waited := time.perf_counter_ns() - begin) < 50_000_000:
                time.sleep(0.001)
        answer, found = asked.result(), embedding.result()
    parts = (answer.load_duration, answer.prompt_eval_duration, answer.eval_duration)
    assert all(part is not None and part >= 0 for part in parts)
    assert answer.total_duration is not None
    assert answer.total_duration >= waited + sum(part or 0 for part in parts)
    assert found.total_duration is not None
    assert found.load_duration is not None
    assert found.total_duration >= waited + found.load_duration


def test_generate_in_every_form(client: ollama.Client, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12)
    asked = client.generate(NAME, "Hello", options=GREEDY)
    assert asked.response == llm.chat(MESSAGES, params).text
    system = client.generate(NAME, "Hello", system="Be brief", options=GREEDY)
    assert system.response == llm.chat([{"role": "system", "content": "Be brief"}, *MESSAGES], params).text
    raw = client.generate(NAME, "<|im_start|>user\nHi", raw=True, options=GREEDY)
    assert raw.response == llm.generate([llm.tokenizer.encode_trusted("<|im_start|>user\nHi")], params)[0].text
    assert raw.context is None


def test_a_context_goes_on_where_the_answer_ended(client: ollama.Client, llm: LLM) -> None:
    first = client.generate(NAME, "Hello", options={**GREEDY, "stop": ["\x00"]})
    assert first.context is not None
    second = client.generate(NAME, "And then?", context=first.context, options=GREEDY)
    assert second.context is not None
    assert list(second.context[: len(first.context)]) == list(first.context)
    question = llm.template.render(
        [*MESSAGES, {"role": "assistant", "content": "b"}, {"role": "user", "content": "And then?"}], add_generation_prompt=True
    ).ids
    asked = list(second.context[len(first.context) : len(second.context) - (second.eval_count or 0)])
    assert asked == list(question[-len(asked) :])


def test_what_has_no_tokens_for_it_cannot_be_filled_in(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="suffix: this model has no tokens for filling in the middle"):
        client.generate(NAME, "def f():", suffix="return x")


def test_what_constraints_need_is_made_when_nobody_asks(client: ollama.Client, running: Running) -> None:
    client.chat(NAME, MESSAGES, options=GREEDY, keep_alive="10m")
    grammars = running.server.models.loaded[NAME].llm.engine.grammars
    assert grammars._vocabulary is None
    begin = time.monotonic()
    while grammars._vocabulary is None and time.monotonic() - begin < 30:
        time.sleep(0.05)
    assert grammars._vocabulary is not None


def test_lists(client: ollama.Client, running: Running) -> None:
    assert [model.model for model in client.list().models] == [NAME, "tiny:two"]
    assert client.ps().models == []
    client.chat(NAME, MESSAGES, options=GREEDY, keep_alive="10m")
    (loaded,) = client.ps().models
    assert loaded.name == NAME
    assert loaded.expires_at is not None
    (told,) = running.client.get("/api/ps").json()["models"]
    assert (told["in_use"], told["device"], told["context_length"]) == (False, "cpu", 1024)
    assert told["size"] > told["cache_bytes"] > 0
    version = running.client.get("/api/version").json()
    assert version["qwen2"] == __version__
    assert tuple(map(int, version["version"].split("."))) >= (0, 6, 4), "older servers are refused by clients"
    assert running.client.head("/api/version").status_code == 200
    shown = client.show(NAME)
    assert shown.modelinfo is not None
    assert shown.modelinfo[f"{shown.modelinfo['general.architecture']}.context_length"] == 1024
    assert shown.capabilities == ["completion", "embedding", "tools"]


def test_details_are_written_as_ollama_writes_them(running: Running, home: Path) -> None:
    count = tiny(context=1024).parameters()
    details = {
        "format": "safetensors",
        "family": "qwen2",
        "families": ["qwen2"],
        "parameter_size": counted(count),
        "quantization_level": "F32",
    }
    assert running.chat(max_tokens=1).status_code == 200
    shown = running.post("/api/show", model=NAME, verbose=True).json()
    for one in (shown, *(running.client.get(f"/api/{path}").json()["models"][0] for path in ("tags", "ps"))):
        assert {key: one["details"][key] for key in details} == details
    assert shown["model_info"]["general.parameter_count"] == count
    assert [counted(n) for n in (494_032_768, 1_543_714_304, 7_000_000_000, 135_000_000, 4_200, 12)] == [
        "494.03M", "1.5B", "7B", "135M", "4K", "12",
    ]  # fmt: skip
    assert running.client.head("/api/tags").status_code == 200


def test_what_is_shown_is_read_once(running: Running, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a tokenizer, and Python's lock while that is made; what changes is seen nevertheless."""
    read, store, name = list[Path](), Store(home), "mine:shown"
    config = Path(shutil.copytree(store.find(NAME), tmp_path / "model")) / "config.json"
    store.copy(str(config.parent), "mine:base")  # which leaves the files there

    def counted_reading(path: Path, adapter: Path | None = None) -> describe.Description:
        read.append(path)
        return reading(path, adapter)

    reading = describe.describe
    monkeypatch.setattr(describe, "describe", counted_reading)
    try:
        for temperature in (0.25, 0.5):
            made = {"model": name, "from": "mine:base", "system": "Be brief", "parameters": {"temperature": temperature}, "stream": False}
            assert running.post("/api/create", **made).status_code == 200
            read.clear()
            first, second = (running.post("/api/show", model=name).json() for _ in range(2))
            assert first == second
            assert f"{temperature}\n" in first["parameters"]
            assert first["system"] == "Be brief"
            assert read == [config.parent]
        values = json.loads(config.read_text())
        assert running.post("/api/show", model=name).json()["model_info"]["qwen2.rope.freq_base"] == values["rope_theta"]
        assert len(read) == 1
        config.write_text(json.dumps({**values, "rope_theta": 123.0}))
        assert running.post("/api/show", model=name).json()["model_info"]["qwen2.rope.freq_base"] == 123.0
        assert len(read) == 2
    finally:
        for one in (name, "mine:base"):
            if store.has(one):
                store.remove(one)


def test_tools_are_a_capability_where_the_template_has_a_place_for_them(running: Running, home: Path) -> None:
    template = "{% for one in messages %}{{ one.content }}{% endfor %}"
    try:
        for name, source in (("mine:plain", template), ("mine:tools", "{{ tools }}" + template)):
            assert running.post("/api/create", **{"model": name, "from": NAME, "template": source, "stream": False}).status_code == 200
        found = [running.post("/api/show", model=name).json()["capabilities"] for name in ("mine:plain", "mine:tools")]
        assert found == [["completion", "embedding"], ["completion", "embedding", "tools"]]
    finally:
        for name in ("mine:plain", "mine:tools"):
            if Store(home).has(name):
                Store(home).remove(name)


def test_what_is_kept_of_a_cut_prompt_changes_nothing(client: ollama.Client) -> None:
    texts = {client.chat(NAME, MESSAGES, options={**GREEDY, "num_keep": keep}).message.content for keep in (-1, 0, 24)}
    assert len(texts) == 1


def test_models_are_loaded_and_unloaded_without_a_word(client: ollama.Client, running: Running) -> None:
    assert client.chat(NAME, []).done_reason == "load"
    assert list(running.server.models.loaded) == [NAME]
    assert client.generate(NAME, keep_alive=0).done_reason == "unload"
    assert not running.server.models.loaded
    client.chat(NAME, MESSAGES, options=GREEDY, keep_alive=-1)
    assert running.server.models.loaded[NAME].expires is None


def test_how_long_a_model_stays(running: Running) -> None:
    def stays(**said: Any) -> float | None:
        assert running.post("/api/generate", model=NAME, stream=False, **said).status_code == 200
        assert running.client.get("/api/ps").status_code == 200
        return running.server.models.loaded[NAME].keep_alive

    assert stays() == running.server.settings.keep_alive
    assert [stays(keep_alive=time) for time in ("1h30m", "1m30s", "9000ms", "1.5h", 90)] == [5400, 90, 9, 5400, 90]
    assert [stays(keep_alive=time) for time in (1e300, -1, "-1m", "9000h")] == [None] * 4
    assert stays() is None, "said once, it holds"
    assert running.chat(max_tokens=1).status_code == 200
    assert running.server.models.loaded[NAME].keep_alive is None
    broken = f'{{"model": "{NAME}", "keep_alive": 1e400}}'
    answer = running.client.post("/api/generate", content=broken)
    assert (answer.status_code, "no time" in answer.json()["error"]) == (400, True)


def test_embeddings(client: ollama.Client, llm: LLM, running: Running) -> None:
    found = client.embed(NAME, ["a rose", "b"], truncate=False)
    assert [list(one) for one in found.embeddings] == llm.embed(["a rose", "b"]).tolist()
    assert running.post("/api/embeddings", model=NAME, prompt="b").json()["embedding"] == llm.embed(["b"])[0].tolist()


def test_a_text_is_cut_where_that_is_asked_for(client: ollama.Client, llm: LLM, running: Running) -> None:
    ids = llm.tokenizer.encode("a long text of several tokens")
    found = client.embed(NAME, ["a long text of several tokens", "b"], truncate=True, options={"num_ctx": 5})
    assert [list(one) for one in found.embeddings] == [*llm.embed([ids[:5]]).tolist(), *llm.embed(["b"]).tolist()]
    assert found.prompt_eval_count == 5 + len(llm.tokenizer.encode("b"))
    assert client.embed(NAME, "x" * 3000, truncate=True).prompt_eval_count == llm.window
    assert running.post("/api/embed", model=NAME, input="x" * 3000).status_code == 400


def test_copies_and_deletions(serve: Callable[..., Running], tmp_path: Path, home: Path) -> None:
    running = serve()
    client = ollama.Client(host=running.url)
    client.copy(NAME, "mine:copy")
    try:
        assert (
            client.chat("mine:copy", MESSAGES, options=GREEDY).message.content
            == client.chat(NAME, MESSAGES, options=GREEDY).message.content
        )
        client.delete("mine:copy")
        assert "mine:copy" not in [model.model for model in client.list().models]
        with pytest.raises(ollama.ResponseError, match="model 'mine:copy' is not here"):
            client.delete("mine:copy")
    finally:
        store = Store(home)
        if store.has("mine:copy"):
            store.remove("mine:copy")
    for name in ("../evil", "a/b/c", "x" * 300, "mine:co py"):
        with pytest.raises(ollama.ResponseError):
            client.copy(NAME, name)


@pytest.mark.parametrize("key", ["model", "name"])
def test_a_model_is_called_by_either_key(running: Running, home: Path, key: str) -> None:
    """Ollama's JavaScript client says `name`."""
    running.post("/api/copy", source=NAME, destination="mine:named")
    try:
        assert running.post("/api/show", **{key: "mine:named"}).json()["model_info"]
        assert running.post("/api/pull", **{key: "mine:named"}, stream=False).json()["status"] == "success"
        assert running.client.request("DELETE", "/api/delete", json={key: "mine:named"}).status_code == 200
        assert not Store(home).has("mine:named")
    finally:
        if Store(home).has("mine:named"):
            Store(home).remove("mine:named")
    for method, path in (("POST", "show"), ("POST", "pull"), ("DELETE", "delete")):
        both = running.client.request(method, f"/api/{path}", json={"model": NAME, "name": "tiny:two"})
        assert (both.status_code, both.json()["error"]) == (400, "model and name differ: send one of them")
        neither = running.client.request(method, f"/api/{path}", json={})
        assert (neither.status_code, neither.json()["error"]) == (400, "say the model's name as model")


def test_num_ctx_bounds_one_request_and_loads_nothing_anew(client: ollama.Client, running: Running) -> None:
    client.chat(NAME, MESSAGES, options=GREEDY)
    llm = running.server.models.loaded[NAME].llm
    answer = client.chat(NAME, MESSAGES, options={"temperature": 0, "num_ctx": 100, "stop": []})
    assert (answer.prompt_eval_count or 0) + (answer.eval_count or 0) <= 100
    with pytest.raises(ollama.ResponseError, match="and num_ctx is 3: raise it, or shorten the prompt"):
        client.chat(NAME, MESSAGES, options={"num_ctx": 3})
    assert running.server.models.loaded[NAME].llm is llm


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("chat", {"foo": 1}, 400, "unknown field foo: this server would have to ignore it"),
        ("chat", {"options": {"temprature": 1}}, 400, "unknown field options.temprature"),
        ("chat", {"options": {"mirostat": 2}}, 400, "options.mirostat is 2: only 0 is offered"),
        ("chat", {"options": {"top_p": 7}}, 400, "top_p 7.0: must be above 0 and at most 1 (off)"),
        ("chat", {"model": "nothing:here"}, 404, "model 'nothing:here' is not here"),
        (
            "chat",
            {"messages": [{"role": "user", "content": "x", "images": ["aa"]}]},
            400,
            "images are given, and these models read text only",
        ),
        ("chat", {"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "the window is 1,024"),
        ("generate", {"prompt": "a", "keep_alive": "soon"}, 400, "'soon': write a time as 90, 10m or 1h30m; -1 is for good"),
        ("generate", {"prompt": "a", "keep_alive": "nan"}, 400, "'nan': write a time as"),
        ("generate", {"prompt": "a", "keep_alive": "1e400"}, 400, "'1e400': write a time as"),
        ("generate", {"prompt": "a", "keep_alive": "9" * 400}, 400, "inf is no time"),
        ("embed", {"input": ["x" * 3000], "truncate": False}, 400, "the window is 1,024: shorten the text"),
        ("pull", {"model": "../evil"}, 404, "evil"),
    ],
)
def test_refusals_have_ollamas_shape(running: Running, path: str, body: dict[str, Any], status: int, message: str) -> None:
    standing: dict[str, Any] = {"model": NAME, "stream": False} | ({"messages": MESSAGES} if path == "chat" else {})
    if path == "embed":
        del standing["stream"]
    answer = running.client.post(f"/api/{path}", json={**standing, **body})
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}
    assert message in answer.json()["error"]


def test_a_pull_of_what_is_here_ends_at_once_and_of_nothing_says_so(running: Running) -> None:
    lines = [json.loads(line) for line in running.post("/api/pull", model=NAME).text.splitlines()]
    assert lines[0] == {"status": "pulling manifest"}
    assert lines[-1] == {"status": "success"}
    lines = [json.loads(line) for line in running.post("/api/pull", model="nothing:here").text.splitlines()]
    assert "nothing" in lines[-1]["error"]


def test_one_client_s_keep_alive_breaks_off_no_other(running: Running) -> None:
    """The model goes when nobody uses it any more, though those who still do would have kept it."""
    running.chat(max_tokens=1)
    engine = running.server.models.loaded[NAME].llm.engine
    with ThreadPoolExecutor(1) as pool:
        with engine.lock:
            writing = pool.submit(running.chat, max_tokens=20, logit_bias={"511": -100, "509": -100})
            while not engine.inbox:
                time.sleep(0.005)
            assert running.post("/api/generate", model=NAME, keep_alive=0, stream=False).json()["done_reason"] == "unload"
            assert list(running.server.models.loaded) == [NAME]
        answer = writing.result()
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 20)
    begin = time.monotonic()
    while running.server.models.loaded and time.monotonic() - begin < 20:
        time.sleep(0.05)
    assert not running.server.models.loaded


def test_options_that_would_be_ignored_are_refused(running: Running) -> None:
    refused = [
        ("/api/chat", {"model": NAME, "messages": MESSAGES, "options": {"penalize_newline": False}}),
        ("/api/chat", {"model": NAME, "messages": MESSAGES, "top_logprobs": 2}),
        ("/api/embed", {"model": NAME, "input": "a long text of several tokens", "truncate": False, "options": {"num_ctx": 2}}),
    ]
    for path, body in refused:
        assert running.client.post(path, json=body).status_code == 400, path
