"""`qwen2 run` through a running server: told as without one, and only where the server is ours and can do what is asked."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qwen2 import LLM, SamplingParams
from qwen2.cli.app import main
from qwen2.cli.chat import TOPICS, Chat
from qwen2.cli.client import address_of
from qwen2.cli.conversation import Conversation
from qwen2.cli.partner import Local
from qwen2.cli.remote import Remote, Server, find
from qwen2.config import tiny
from qwen2.engine.constraint import Constraint
from qwen2.weights.export import to_hf_folder
from qwen2.weights.modelfile import parse
from qwen2.weights.store import Store
from tests.cli.test_chat import Pieces
from tests.cli.test_run import Stdin, environment
from tests.cli.test_serve import free_port, served
from tests.conftest import tiny_model

HELLO = [{"role": "user", "content": "Hello"}]
PARAMS = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
LONG = replace(PARAMS, max_tokens=7000)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a window so long that an answer can be stopped before it ends."""
    folder = tmp_path_factory.mktemp("remote")
    home = folder / "home"
    to_hf_folder(tiny_model(tiny(context=8192)), folder / "model")
    Store(home).copy(str(folder / "model"), "tiny:one")
    Store(home).create("tiny:made", parse("FROM tiny:one\nSYSTEM Be brief\nPARAMETER top_k 4\nMESSAGE user a\nMESSAGE assistant b"))
    return home


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    with served(home) as (_, url):
        yield url.removeprefix("http://")


@pytest.fixture
def remote(url: str) -> Remote:
    return Server(url).open("tiny:one")


@pytest.fixture(scope="module")
def local(home: Path) -> Local:
    return Local(LLM("tiny:one", home=home))


def run(home: Path, *words: str, at: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen2", "run", *words]
    given = environment(home) | ({} if at is None else {"QWEN2_SERVER": at})
    return subprocess.run(command, capture_output=True, text=True, env=given, stdin=subprocess.DEVNULL, timeout=300)


@pytest.mark.parametrize("params", [
    PARAMS, SamplingParams(temperature=0, max_tokens=5), replace(PARAMS, stop=("e", "o")), replace(PARAMS, logit_bias={7: 9.5}, logprobs=2),
    replace(PARAMS, stop_token_ids=(5, 6), presence_penalty=0.5, context=60), replace(PARAMS, constraint=Constraint.regex("[a-c]{3,9}")),
], ids=["drawn", "greedy", "stops", "biases", "ids", "form"])  # fmt: skip
def test_answers_are_those_of_this_process(remote: Remote, local: Local, params: SamplingParams) -> None:
    ours, theirs = list(local.stream(HELLO, params)), list(remote.stream(HELLO, params))
    assert "".join(chunk.text for chunk in ours) == "".join(chunk.text for chunk in theirs)
    right, output = ours[-1].output, theirs[-1].output
    assert right is not None
    assert output is not None
    assert replace(output, timings=right.timings, usage=replace(output.usage, cached_tokens=right.usage.cached_tokens)) == right
    assert [chunk.output for chunk in theirs[:-1]] == [None] * (len(theirs) - 1)


def test_a_conversation_says_the_same(remote: Remote, local: Local, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for partner in (local, remote):
        chat = Chat(partner, Conversation("tiny:one", params=PARAMS), Pieces)
        for line in (
            "Hello",
            "/set parameter top_k 3",
            "And then?",
            "/system Be brief",
            "/retry",
            "/set temperature hot",
            *(f"/show {topic}" for topic in TOPICS),
        ):
            chat.handle(line)
        chat.handle("quick brown " * 8000)
        found = capsys.readouterr()
        said.append((found.out, found.err, chat.conversation.turns))
    assert said[0] == said[1]
    assert "the window is" in said[0][1]


def test_a_made_models_own_are_shown(url: str, home: Path) -> None:
    made, local = Server(url).open("tiny:made"), Local(LLM("tiny:made", home=home))
    assert replace(made.about, place="", computing="") == replace(local.about, place="", computing="")
    assert (made.about.system, made.about.generation.top_k) == ("Be brief", 4)
    assert made.count(HELLO) == local.count(HELLO)
    first, second = (list(partner.stream(HELLO, PARAMS))[-1].output for partner in (made, local))
    assert first is not None
    assert second is not None
    assert first.token_ids == second.token_ids


def test_ctrl_c_ends_the_answer_and_its_counts_still_come(remote: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = Pieces(3)
    chat = Chat(remote, Conversation("tiny:one", params=LONG), lambda: pieces, verbose=True)
    chat.handle("Hello")
    error = capsys.readouterr().err
    assert error.startswith("(stopped)\n")
    counted = re.search(r"answer +(\d+) tokens", error)
    assert counted
    assert 0 < int(counted[1]) < 7000
    assert "of the server at" in error
    assert chat.conversation.turns[1].stopped
    chat.conversation.params = PARAMS
    chat.handle("And then?")  # goes on
    assert not chat.conversation.turns[3].stopped


def test_a_client_that_is_gone_frees_its_answer(remote: Remote, url: str) -> None:
    stream = remote.stream(HELLO, LONG)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    for _ in range(200):
        time.sleep(0.05)
        with Server(url).request("GET", "/metrics") as answer:
            text = answer.read().decode()
        running = re.search(r"^qwen2_running\S* (\S+)$", text, re.MULTILINE)
        assert running, text
        if float(running[1]) == 0:
            return
    raise AssertionError("the answer of a client that is gone runs on")


def test_the_command_says_the_same_and_imports_no_torch(home: Path, url: str) -> None:
    words = ("tiny:one", "Hello", "--temperature", "1", "--seed", "4", "--max-tokens", "9", "--ignore-eos")
    here, there = run(home, *words, "--local", at=url), run(home, *words, at=url)
    assert (there.returncode, there.stdout, there.stderr) == (0, here.stdout, here.stderr)
    verbose = run(home, *words, "--verbose", at=url)
    assert f"of the server at {url}" in verbose.stderr
    assert [line.split()[0] for line in verbose.stderr.splitlines()] == [
        "(cut:",
        "prompt",
        "answer",
        "load",
        "device",
        "context",
        "sampling",
    ]
    code = f"""
import sys
from qwen2.cli.app import main
code = main(["run", "tiny:one", "Hello", "--max-tokens", "3", "--at", {url!r}])
assert code == 0
assert not {{"torch", "httpx"}} & sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(home), stdin=subprocess.DEVNULL, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_flags_of_this_process_run_here_and_say_so(home: Path, url: str) -> None:
    done = run(home, "tiny:one", "Hello", "--max-tokens", "3", "--threads", "1", "--cache-bits", "8", at=url)
    assert done.returncode == 0
    first = f"qwen2: --threads, --cache-bits: the server at {url} cannot be asked for that: running it here"
    assert done.stderr.splitlines()[0] == first


def test_refusals_of_the_server_are_this_programs(home: Path, url: str) -> None:
    done = run(home, "tiny:one", "x" * 40000, at=url)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(r"qwen2: prompt has [\d,]+ tokens, the window is", done.stderr)
    assert done.stderr == run(home, "tiny:one", "x" * 40000, "--local").stderr


def test_a_server_that_is_killed_ends_the_answer_with_a_line(home: Path) -> None:
    with served(home) as (process, url):
        partner = Server(url.removeprefix("http://")).open("tiny:one")
        stream = partner.stream(HELLO, LONG)
        next(stream)
        process.send_signal(signal.SIGKILL)
        with pytest.raises(OSError, match=r"^the server at \S+ (ended in the middle of the answer|does not answer any more|broke off)"):
            list(stream)


# --- servers that are not ours


@contextmanager
def answering(who: Any) -> Iterator[str]:
    """Something else at a port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(who).encode() if who is not None else b"hello"
            self.send_response(404 if who is None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("who", "why"),
    [
        (None, "is no server of ours (status 404)"),
        ({"version": "0.30.1"}, "is no server of ours"),
        ({"program": "qwen2", "version": "0.0.0"}, "is qwen2 0.0.0, and this is "),
        ([1], "is no server of ours"),
    ],
)
def test_others_are_not_asked(home: Path, who: Any, why: str) -> None:
    with answering(who) as at:
        server, said = find(at, Store(home))
    assert server is None
    assert why in said


def test_another_store_at_the_default_address_is_not_asked(home: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2.cli.remote.DEFAULT", url)
    monkeypatch.setenv("QWEN2_SERVER", url)
    assert find(None, Store(home))[0] is not None
    assert find(None, Store(tmp_path)) == (None, f"the server at {url} has another store of models")
    assert find(url, Store(tmp_path))[0] is not None  # named, it is wanted


def test_without_a_server_nothing_is_said_unless_one_was_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"127.0.0.1:{free_port()}"
    assert find(place, Store(home))[1] == f"the server at {place} does not answer (Connection refused)"
    monkeypatch.setattr("qwen2.cli.remote.DEFAULT", place)
    monkeypatch.setenv("QWEN2_SERVER", place)
    assert find(None, Store(home)) == (None, "")
    monkeypatch.setenv("QWEN2_SERVER", "")
    assert address_of(None) == "127.0.0.1:11434"


def test_a_named_server_that_does_not_answer_is_an_error(home: Path) -> None:
    """And no reason to download what it may have."""
    place = f"127.0.0.1:{free_port()}"
    refused = f"qwen2: the server at {place} does not answer (Connection refused); --local loads the model here\n"
    for done in (run(home, "tiny:one", "Hello", at=place), run(home, "qwen2:7b", "Hello", "--at", place)):
        assert (done.returncode, done.stdout, done.stderr) == (1, "", refused)
    both = run(home, ".", "Hello", "--at", place)
    assert both.stderr == f"qwen2: --at {place}: . is a file or folder here, and a server is asked by name; leave one of them out\n"


def test_a_model_that_only_the_server_has(home: Path, url: str, tmp_path: Path) -> None:
    there = run(tmp_path / "none", "tiny:made", "Hello", "--max-tokens", "3", "--temperature", "0", at=url)
    here = run(home, "tiny:made", "Hello", "--max-tokens", "3", "--temperature", "0", "--local")
    assert (there.returncode, there.stdout) == (0, here.stdout), there.stderr
    assert not (tmp_path / "none" / "models").exists()
    unknown = run(tmp_path / "none", "hello", "there", at=url)
    assert unknown.returncode == 1
    assert unknown.stderr.startswith(f"qwen2: the server at {url} says: model 'hello' is not here")
    assert unknown.stderr.endswith("; if it is a question: qwen2 run qwen2.5-coder:0.5b 'hello there'\n")


def test_a_server_that_has_the_store_here_is_asked_for_what_was_just_pulled(
    home: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is there only after the first question."""
    monkeypatch.setenv("QWEN2_HOME", str(home))
    monkeypatch.setattr("qwen2.cli.run.check_model", lambda model, words: None)
    monkeypatch.setattr("qwen2.cli.run.ensure", lambda name: Store(home).copy("tiny:one", name))
    monkeypatch.setattr("qwen2.cli.run.load_model", None)  # it is not loaded here
    monkeypatch.setattr(sys, "stdin", Stdin(b"", False))
    assert main(["run", "tiny:late", "Hello", "--max-tokens", "3", "--at", url]) == 0
    assert "running it here" not in capsys.readouterr().err


def test_the_key_is_sent_and_asked_for(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(home, "--api-key", "secret") as (_, url):
        place = url.removeprefix("http://")
        words = ("tiny:one", "Hello", "--max-tokens", "3", "--at", place)
        said = f"qwen2: the server at {place} wants its key: set QWEN2_API_KEY; --local loads the model here\n"
        assert run(tmp_path, *words).stderr == said
        monkeypatch.setenv("QWEN2_API_KEY", "wrong")
        assert f"the server at {place} does not take the key in QWEN2_API_KEY; " in run(tmp_path, *words).stderr
        monkeypatch.setenv("QWEN2_API_KEY", "secret")
        assert run(tmp_path, *words).returncode == 0
