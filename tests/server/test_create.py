"""/api/create and /api/blobs through Ollama's own client and bare requests, and what a made model does in every dialect."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from qwen2 import LLM, SamplingParams
from qwen2.config import tiny
from qwen2.server.settings import Limits
from qwen2.weights.export import to_gguf
from qwen2.weights.modelfile import parse
from qwen2.weights.store import Store
from tests.conftest import tiny_model
from tests.server.conftest import NAME, Running

HELLO = [{"role": "user", "content": "Hello"}]
FEW = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GREEDY = {"temperature": 0, "num_predict": 12}
NEW = "mine:made"


@pytest.fixture
def client(running: Running) -> ollama.Client:
    return ollama.Client(host=running.url)


@pytest.fixture(autouse=True)
def remove_made(home: Path) -> Iterator[None]:
    yield
    store = Store(home)
    for model in store.list():
        if model.name.startswith("mine:"):
            store.remove(model.name)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "mine.gguf"
    to_gguf(tiny_model(tiny(context=512), 3), path, "F32")
    return path


def digest_of(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_model_from_another_in_every_dialect(client: ollama.Client, running: Running, llm: LLM) -> None:
    parameters = {"temperature": 0, "num_predict": 8, "stop": ["\0"], "num_ctx": 200}
    steps = list(client.create(NEW, from_=NAME, system="Be brief", parameters=parameters, messages=FEW, license="MIT", stream=True))
    assert steps[-1].status == "success"
    assert "writing manifest" in [step.status for step in steps]
    right = llm.chat([{"role": "system", "content": "Be brief"}, *FEW, *HELLO], SamplingParams(temperature=0, max_tokens=8)).text
    assert client.chat(NEW, HELLO).message.content == right
    assert client.generate(NEW, "Hello").response == right
    posts: dict[str, tuple[dict[str, Any], Callable[[Any], str]]] = {
        "/v1/chat/completions": ({"messages": HELLO}, lambda found: found["choices"][0]["message"]["content"]),
        "/v1/responses": ({"input": "Hello"}, lambda found: found["output"][0]["content"][0]["text"]),
        "/v1/messages": ({"messages": HELLO, "max_tokens": 8}, lambda found: found["content"][0]["text"]),
    }
    for path, (body, text) in posts.items():
        answer = running.post(path, model=NEW, **body)
        assert text(answer.json()) == right, path
    own = [{"role": "system", "content": "Mine"}, *HELLO]
    other = llm.chat([own[0], *FEW, *HELLO], SamplingParams(temperature=0, max_tokens=5)).text
    assert client.chat(NEW, own, options={"num_predict": 5}).message.content == other
    counted = running.post("/tokenize", model=NEW, messages=HELLO).json()["tokens"]
    assert counted == llm.template.render([{"role": "system", "content": "Be brief"}, *FEW, *HELLO]).ids
    long = [{"role": "user", "content": "x" * 300}]
    for path, body in (("/v1/chat/completions", {"messages": long}), ("/api/chat", {"messages": long})):
        refused = running.post(path, model=NEW, **body)
        assert refused.status_code == 400
        assert "num_ctx is 200" in refused.text
    assert client.chat(NEW, long, options={"num_ctx": 1000, "num_predict": 1}).done  # a request goes before the Modelfile


def test_shown_it_makes_itself_again(client: ollama.Client, running: Running) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
    client.create(NEW, from_=NAME, system='Say "x"', template=template, parameters={"stop": "END", "top_k": 3}, messages=FEW)
    shown = running.post("/api/show", model=NEW).json()
    assert (shown["system"], shown["template"], shown["messages"]) == ('Say "x"', template, FEW)
    assert 'stop                           "END"' in shown["parameters"].splitlines()
    assert "top_k                          3" in shown["parameters"].splitlines()
    assert shown["details"]["parent_model"] == NAME
    answer = running.post("/api/create", model="mine:again", modelfile=shown["modelfile"], stream=False)
    assert answer.json() == {"status": "success"}
    again = running.post("/api/show", model="mine:again").json()
    assert [again[key] for key in ("system", "template", "messages", "parameters")] == [
        shown[key] for key in ("system", "template", "messages", "parameters")
    ]
    assert {model.model for model in client.list().models} >= {NAME, NEW, "mine:again"}
    client.copy(NEW, "mine:copy")
    client.delete(NEW)
    assert running.post("/api/show", model="mine:copy").json()["system"] == 'Say "x"'


def test_made_again_while_it_is_in_memory(client: ollama.Client, running: Running, llm: LLM) -> None:
    for system in ("one", "two"):
        client.create(NEW, from_=NAME, system=system)
        right = llm.chat([{"role": "system", "content": system}, *HELLO], SamplingParams(temperature=0, max_tokens=12)).text
        assert client.chat(NEW, HELLO, options=GREEDY).message.content == right
    before = running.server.models.loaded[NEW].llm
    client.chat(NEW, HELLO, options=GREEDY)
    assert running.server.models.loaded[NEW].llm is before


def test_uploaded_files(client: ollama.Client, running: Running, gguf: Path, home: Path) -> None:
    digest = digest_of(gguf)
    assert running.client.head(f"/api/blobs/{digest}").status_code == 404
    assert client.create_blob(gguf) == digest
    assert running.client.head(f"/api/blobs/{digest}").status_code == 200
    client.create(NEW, files={"mine.gguf": digest}, system="Be brief")
    stored = Store(home).get(NEW)
    assert f"sha256:{stored.digest}" == digest
    right = LLM(gguf).chat([{"role": "system", "content": "Be brief"}, *HELLO], SamplingParams(temperature=0, max_tokens=12)).text
    assert client.chat(NEW, HELLO, options=GREEDY).message.content == right
    assert client.create_blob(gguf) == digest  # is here already, as the model's file
    assert not list((home / "blobs").iterdir())
    modelfile = f"FROM @{digest}\nSYSTEM two"
    assert running.post("/api/create", name="mine:other", modelfile=modelfile, stream=False).status_code == 200
    client.create("mine:small", from_=NEW, quantize="q8_0")
    assert Store(home).get("mine:small").format == "GGUF Q8_0"
    assert client.chat("mine:small", HELLO, options=GREEDY).done


def test_a_folders_files(client: ollama.Client, tiny_folder: Path, home: Path) -> None:
    files = {path.name: client.create_blob(path) for path in tiny_folder.iterdir()}
    client.create(NEW, files=files)
    assert client.chat(NEW, HELLO, options=GREEDY).done
    with pytest.raises(ollama.ResponseError, match=r"files: evil\.py is not a file of a model"):
        client.create("mine:bad", files={**files, "evil.py": files["config.json"]})
    del files["config.json"]
    with pytest.raises(ollama.ResponseError, match=r"a model's folder holds config\.json") as told:
        client.create("mine:bad", files=files)
    assert str(home) not in str(told.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "../evil", "from": NAME}, "is not a model's name"),
        ({"model": "qwen2:7b", "from": NAME}, "qwen2:7b is the name of a published model"),
        ({"from": NAME}, "create: say the new model's name as model"),
        ({"model": NEW}, "create: say from, a model's name, or files, one of them"),
        ({"model": NEW, "from": NAME, "files": {"a.gguf": f"sha256:{'0' * 64}"}}, "create: say from, a model's name, or files"),
        ({"model": NEW, "from": "/etc/passwd"}, "'/etc/passwd' is no model's name; files of yours are uploaded"),
        ({"model": NEW, "from": "../x.gguf"}, "is no model's name"),
        ({"model": NEW, "from": "nothing:here"}, "no model is named 'nothing:here'"),
        ({"model": NEW, "modelfile": f"FROM {NAME}\nPARAMETER x 1"}, "modelfile: line 2: unknown parameter 'x'"),
        ({"model": NEW, "modelfile": "FROM ./x.gguf"}, "is no model's name"),
        ({"model": NEW, "modelfile": "FROM @sha256:1"}, "is no digest"),
        ({"model": NEW, "modelfile": f"FROM {NAME}", "system": "x"}, "modelfile says it all"),
        ({"model": NEW, "from": NAME, "adapters": {"a": f"sha256:{'0' * 64}"}}, "adapters: 'a': an adapter's files are adapter_config.json and"),
        ({"model": NEW, "from": NAME, "adapters": {"lora.gguf": f"sha256:{'0' * 64}"}}, "adapters: lora.gguf is not uploaded yet: POST"),
        ({"model": NEW, "from": NAME, "adapters": {"adapter_config.json": f"sha256:{'0' * 64}"}}, "adapters: adapter_config.json is not uploaded yet"),
        ({"model": NEW, "modelfile": f"FROM {NAME}\nADAPTER /etc"}, "modelfile: ADAPTER: no server reads what a client names"),
        ({"model": NEW, "from": NAME, "template": "{{ .Prompt }}"}, "this is a template in Go's language"),
        ({"model": NEW, "from": NAME, "template": "hello"}, "what a person says does not appear in it"),
        ({"model": NEW, "from": NAME, "parameters": {"temprature": 1}}, "unknown parameter 'temprature': did you mean temperature?"),
        ({"model": NEW, "from": NAME, "parameters": {"top_p": 7}}, "parameters: top_p 7: must be above 0"),
        ({"model": NEW, "from": NAME, "messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"model": NEW, "from": NAME, "quantize": "q3_x"}, "GGUF format 'q3_x' cannot be written"),
        ({"model": NEW, "from": NAME, "path": "/etc"}, "unknown field path"),
        ({"model": NEW, "from": NAME, "requires": "99"}, "REQUIRES 99: this is qwen2"),
        ({"model": NEW, "files": {"../x.gguf": f"sha256:{'0' * 64}"}}, "is no plain file name"),
        ({"model": NEW, "files": {"x.gguf": "sha256:../x"}}, "is no digest"),
        ({"model": NEW, "files": {"x.gguf": f"sha256:{'0' * 64}"}}, "files: x.gguf is not uploaded yet: POST /api/blobs/sha256:0000"),
        ({"model": NEW, "from": NAME, "parameters": {"num_ctx": 5000}}, "num_ctx 5,000: the model's window is 1,024"),
    ],
)  # fmt: skip
def test_refusals(running: Running, home: Path, body: dict[str, Any], message: str) -> None:
    answer = running.client.post("/api/create", json={**body, "stream": False})
    assert answer.status_code == 400, answer.text
    assert answer.json().keys() == {"error"}
    assert message in answer.json()["error"]
    assert str(home) not in answer.text
    assert not Store(home).has(NEW)


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:" + "0" * 63,
        "sha256:" + "g" * 64,
        "md5:" + "0" * 32,
        "..",
        "sha256:..%2F..%2Fx",
        "sha256:" + "0" * 64 + "%00",
        "%2e%2e%2fmodels",
    ],
)
def test_digests_by_the_grammar_only(running: Running, home: Path, digest: str) -> None:
    before = {path for path in home.rglob("*") if "locks" not in path.parts}
    for method in ("HEAD", "POST"):
        assert running.client.request(method, f"/api/blobs/{digest}", content=b"x" if method == "POST" else None).status_code in (
            400,
            404,
            405,
        )
    assert {path for path in home.rglob("*") if "locks" not in path.parts} == before


def test_uploads_are_verified_and_bounded(serve: Callable[..., Running], home: Path) -> None:
    running = serve(limits=Limits(body_bytes=2000, blob_bytes=5000))
    large, right = b"x" * 4000, f"sha256:{hashlib.sha256(b'x' * 4000).hexdigest()}"
    wrong = running.client.post(f"/api/blobs/sha256:{'0' * 64}", content=large)
    assert (wrong.status_code, "have the digest" in wrong.json()["error"]) == (400, True)
    assert running.client.post(f"/api/blobs/{right}", content=b"x" * 6000).status_code == 413
    pieces = (b"y" * 1000 for _ in range(9))  # without a length
    assert running.client.post(f"/api/blobs/{right}", content=pieces).status_code == 413
    assert running.client.post(f"/api/blobs/{right}", content=large).status_code == 201  # larger than other bodies may be
    assert running.client.post("/api/show", content=large).status_code == 413
    assert [path.name for path in (home / "blobs").iterdir()] == [right.replace(":", "-")]
    (home / "blobs" / right.replace(":", "-")).unlink()


def test_a_client_that_leaves_in_the_middle_leaves_nothing(running: Running, home: Path) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST /api/blobs/sha256:{'0' * 64} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n".encode())
        connection.sendall(b"x" * 2_000_000)
        while not list((home / "blobs").glob("*.upload")):
            time.sleep(0.01)
    while list((home / "blobs").iterdir()):
        time.sleep(0.01)


def test_a_server_killed_in_the_middle_leaves_the_store_whole(tmp_path: Path, tiny_folder: Path) -> None:
    store = Store(tmp_path / "home")
    store.copy(str(tiny_folder), "tiny:one")
    store.create("mine", parse("FROM tiny:one\nSYSTEM one"))
    before = store.list()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "qwen2", "serve", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, env={**os.environ, "QWEN2_HOME": str(store.home)}, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            try:
                httpx.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        return process

    process = start()
    try:
        with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                f"POST /api/blobs/sha256:{'0' * 64} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000000\r\n\r\n".encode()
            )
            connection.sendall(b"x" * 3_000_000)
            while not [path for path in (store.home / "blobs").glob("*.upload") if path.stat().st_size]:
                time.sleep(0.01)
            making = pool.submit(
                httpx.post, f"{url}/api/create", json={"model": "mine", "from": "tiny:one", "quantize": "q8_0"}, timeout=60
            )
            while not (store.home / "partial" / "mine").exists() and not making.done():
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
            assert making.exception() is not None or making.result().status_code == 200
        process.wait(20)
        there = store.list()
        assert [model.name for model in there] == [model.name for model in before]
        assert not any(model.gone for model in there)
        (left,) = (store.home / "blobs").glob("*.upload")
        os.utime(left, (1, 1))  # a day later
        process = start()
        assert not left.exists()
        answer = httpx.post(f"{url}/api/create", json={"model": "mine", "from": "tiny:one", "system": "two", "stream": False}, timeout=60)
        assert answer.json() == {"status": "success"}
        assert store.get("mine").made.system == "two"
    finally:
        process.kill()
        process.wait(20)


def test_lines_end_with_what_happened(running: Running) -> None:
    lines = [json.loads(line) for line in running.post("/api/create", model=NEW, **{"from": "nothing:here"}).text.splitlines()]
    assert "no model is named 'nothing:here'" in lines[-1]["error"]
    lines = [json.loads(line) for line in running.post("/api/create", model=NEW, **{"from": NAME}).text.splitlines()]
    assert lines == [{"status": "writing manifest"}, {"status": "success"}]
