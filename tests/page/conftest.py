"""The page in headless Chromium, before the real server; a tiny model whose grammar lets it write nothing but the scripted answer.

Set QWEN2_CHROMIUM to a browser that is not `chromium` on PATH, and QWEN2_SCREENSHOTS to a folder that shall have the pictures.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from qwen2 import LLM, SamplingParams
from qwen2.config import tiny
from qwen2.engine.asked import Asked
from qwen2.engine.constraint import Constraint
from qwen2.server.app import create_app
from qwen2.server.settings import Settings
from qwen2.weights.export import to_hf_folder
from qwen2.weights.manifest import StoredModel
from qwen2.weights.pull import Progress
from qwen2.weights.store import Store
from tests.conftest import tiny_model

NAME = "tiny:one"
SEEN = {"width": 1280, "height": 820}
PHONE = {"width": 360, "height": 740}
expect.set_options(timeout=15_000)


class Gate:
    """Lets an engine's steps pass, so many at a time."""

    def __init__(self) -> None:
        self.left: float = float("inf")
        self.fail: Exception | None = None
        self.changed = threading.Condition()

    def hold(self, after: float = 0) -> None:
        """So many steps more."""
        with self.changed:
            self.left = after
            self.changed.notify_all()

    def open(self) -> None:
        """As many as there are."""
        self.hold(float("inf"))

    def step(self) -> None:
        """Called before each step."""
        with self.changed:
            while self.left <= 0:
                self.changed.wait()
            self.left -= 1
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error


class Scripted(LLM):
    """Answers with what `script` has for the last message of the user, going on from what of it is there."""

    script: dict[str, str | Exception]
    asked: list[Asked]
    forgetful: bool  # reads the last message only, so that a conversation may be longer than its window

    def ask(self, prompt: Any, params: SamplingParams | None = None, *more: Any, **options: Any) -> Asked:
        if isinstance(prompt[0], dict):
            question, begun = prompt[-1]["content"], ""
            prompt = prompt[-1:] if self.forgetful else prompt
        else:
            (_, question), (_, begun) = self.turns(prompt)[-2:]
        reply = self.script.get(question, f"You said: {question}")
        if isinstance(reply, Exception):
            raise reply
        assert reply.startswith(begun), "a continuation goes on from the scripted text"
        held = replace(params or SamplingParams(), constraint=Constraint.choice([reply[len(begun) :]]))
        asked = super().ask(prompt, held, *more, **options)
        self.asked.append(asked)
        return asked

    def turns(self, ids: Sequence[int]) -> list[tuple[str, str]]:
        """Role and content of a rendered conversation, the opened turn of the answer last."""
        text = self.tokenizer.decode(list(ids))
        return re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n|$)", text, re.DOTALL)


class Shelf(Store):
    """A store whose downloads are told what to do."""

    gate: Gate
    refused: str | None = None
    folder: Path
    pulled: dict[str, str]  # the name that was asked for: the one under which the tiny model was put

    def pull(self, name: Any, watch: Any = None, sources: Any = None, local: Any = None) -> Any:
        for done in range(0, 101, 10):
            self.gate.step()
            watch(Progress(done * 1_000_000, 100_000_000))
        if self.refused is not None:
            raise OSError(self.refused)
        self.copy(str(self.folder), f"pulled:{len(self.pulled)}")
        self.pulled[str(name)] = f"pulled:{len(self.pulled)}"

    def get(self, name: Any) -> StoredModel:
        return replace(super().get(self.pulled.get(name, name)), name=name)

    def list(self, on_damaged: Any = None) -> tuple[StoredModel, ...]:
        names = {own: name for name, own in self.pulled.items()}
        return tuple(replace(model, name=names.get(model.name, model.name)) for model in super().list())


@dataclass
class Served:
    """A server, its model's script, and its gates."""

    url: str
    llm: Scripted
    gate: Gate
    store: Shelf
    script: dict[str, str | Exception] = field(default_factory=dict)


@pytest.fixture(scope="package")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "tiny"
    to_hf_folder(tiny_model(tiny(context=4096)), folder)
    return folder


@pytest.fixture(scope="package")
def scripted(model_folder: Path) -> Scripted:
    return Scripted(model_folder)


@contextmanager
def running(scripted: Scripted, store: Shelf, **settings: Any) -> Iterator[Served]:
    """A server on a free port."""
    app = create_app(Settings(port=0, **settings), store, lambda name: (scripted, None))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield Served(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", scripted, Gate(), store)
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@contextmanager
def used(served: Served) -> Iterator[Served]:
    """The model follows this server's script while a test runs; at its end nothing may be left."""
    llm, gate = served.llm, served.gate
    served.script.clear()
    llm.script, llm.asked, llm.forgetful = served.script, [], False
    step = type(llm.engine).step

    def gated() -> None:
        gate.step()
        step(llm.engine)

    llm.engine.step = gated  # type: ignore[method-assign]
    yield served
    gate.open()
    served.store.gate.open()
    llm.engine.settle()
    llm.engine.check()


def shelf(home: Path, folder: Path, models: Sequence[str]) -> Shelf:
    """A store with the tiny model under these names."""
    store = Shelf(home)
    store.gate, store.folder, store.pulled = Gate(), folder, {}
    for name in models:
        store.copy(str(folder), name)
    return store


@pytest.fixture
def serve(model_folder: Path, scripted: Scripted, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start a server of the test's own; `models` are the names that are here."""
    with ExitStack() as stack:

        def start(models: Sequence[str] = (NAME,), **settings: Any) -> Served:
            store = shelf(tmp_path / "home", model_folder, models)
            return stack.enter_context(used(stack.enter_context(running(scripted, store, **settings))))

        yield start


@pytest.fixture(scope="package")
def shared(model_folder: Path, scripted: Scripted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running(scripted, shelf(tmp_path_factory.mktemp("shared") / "home", model_folder, [NAME])) as served:
        yield served


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    """The server that most tests share, one after the other."""
    with used(shared):
        yield shared


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """For this folder's tests only: Playwright keeps an event loop on the thread, which others would stumble over."""
    path = os.environ.get("QWEN2_CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.fail("the page's tests need a browser: apt-get install chromium, or set QWEN2_CHROMIUM to one of that family")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


KEPT = """async (chosen) => {
    const [{ Storage }, { path }] = await Promise.all([import("/web/app/storage.js"), import("/web/app/conversation.js")])
    const shown = Array.from(document.querySelectorAll("#thread > li"), (item) => item.dataset.id)
    const store = await Storage.open()
    const stored = await store.get(location.hash.slice(1))
    store.database.close()
    const nodes = stored === undefined ? [] : path(stored)
    const finished = shown.every((id) => stored?.nodes[id] && stored.nodes[id].status !== "writing")
    return finished && (!chosen || nodes.map((node) => node.id).join() === shown.join())
}"""


@dataclass
class Chat:
    """A tab with the page, and what people do in it."""

    page: Page
    served: Served
    name: str
    problems: list[str]

    def open(self, path: str = "/") -> None:
        self.page.goto(self.served.url + path)
        expect(self.page.locator("#model-name")).not_to_have_text("Choose a model")

    @property
    def draft(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    @property
    def messages(self) -> Locator:
        return self.page.locator("#thread > li")

    @property
    def answer(self) -> Locator:
        """The last answer's text."""
        return self.page.locator("#thread > li.assistant .prose").last

    @property
    def read(self) -> list[str]:
        """The messages that the model read last, without the system's."""
        turns = self.served.llm.turns(self.served.llm.asked[-1].request.prompt)
        return [content for role, content in turns if role != "system" and content]

    @property
    def entries(self) -> Locator:
        return self.page.locator("#list .entry-open")

    def send(self, text: str) -> None:
        self.draft.fill(text)
        self.draft.press("Enter")

    def ask(self, text: str, answer: str | None = None) -> None:
        """Send, and wait for the whole answer."""
        self.send(text)
        self.finished()
        expect(self.answer).to_contain_text(answer if answer is not None else f"You said: {text}")

    def finished(self) -> None:
        expect(self.page.locator("#thread .streaming")).to_have_count(0)
        expect(self.page.locator("#send")).to_be_visible()

    def kept(self, chosen: bool = True) -> None:
        """Wait until the browser has stored the messages that are shown, written to their end: the page shows first and stores
        then. `chosen`: also that these are what the conversation shows next, which another tab may have made others."""
        ends = time.monotonic() + 15
        while not self.page.evaluate(KEPT, chosen):  # wait_for_function takes the promise itself for true
            assert time.monotonic() < ends, "the browser has not stored what the page shows"
            self.page.wait_for_timeout(50)

    def reload(self) -> None:
        """Load the page anew, with all that it shows stored."""
        self.kept()
        self.page.reload()

    def do(self, message: int, action: str) -> None:
        """Press a message's button."""
        self.messages.nth(message).hover()
        self.messages.nth(message).get_by_role("button", name=action, exact=True).click()

    def dialog(self, name: str) -> Locator:
        return self.page.get_by_role("dialog", name=name)

    def picture(self, name: str) -> None:
        """Keep a picture where somebody wants them."""
        folder = os.environ.get("QWEN2_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(300)  # what moves has arrived
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture
def tab(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Callable[..., Chat]]:
    """Open tabs; those of one `context` share what the browser keeps. Nothing may be asked of another host, and no script may fail."""
    contexts: list[BrowserContext] = []
    chats: list[Chat] = []

    def start(served: Served, context: BrowserContext | None = None, path: str = "/", ready: bool = True, **options: Any) -> Chat:
        if context is None:
            context = browser.new_context(**{"viewport": SEEN, "locale": "en", "reduced_motion": "reduce", **options})
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            contexts.append(context)
        page = context.new_page()
        chat = Chat(page, served, request.node.name, [])
        page.on("pageerror", lambda error: chat.problems.append(f"script: {error}"))
        page.on("console", lambda said: chat.problems.append(said.text) if "Content Security Policy" in said.text else None)
        page.on("request", lambda asked: chat.problems.append(f"remote: {asked.url}") if foreign(asked.url, served) else None)
        chats.append(chat)
        if ready:
            chat.open(path)
        else:
            page.goto(served.url + path)
        return chat

    yield start
    for context in contexts:
        context.close()
    assert [problem for chat in chats for problem in chat.problems] == []


def foreign(url: str, served: Served) -> bool:
    return not url.startswith((served.url, "data:", "blob:"))


@pytest.fixture
def chat(tab: Callable[..., Chat], served: Served) -> Chat:
    return tab(served)
