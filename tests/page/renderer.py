"""An empty page under the page's own policy with the renderer in it, and what is asked of it: fixtures of the renderer's tests."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, Route, ViewportSize

from qwen2.server.page import HEADERS, add_page

SIZE = ViewportSize(width=800, height=700)
BASE = """<!doctype html><html lang=en><meta charset=utf-8><title>render</title><link rel=stylesheet href=/web/style/tokens.css>
<link rel=stylesheet href=/web/style/prose.css><link rel=stylesheet href=/web/style/render.css>
<body class=shell><main class=prose id=out></main></body></html>"""


class Bench:
    """An empty page under the page's own policy, with the renderer in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.problems: list[str] = []
        page.route("**/bench", lambda route: route.fulfill(body=BASE, headers={**HEADERS, "Content-Type": "text/html"}))
        page.route(lambda target: not target.startswith(url), self.refuse)
        page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        page.on("dialog", lambda dialog: (self.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda said: self.problems.append(f"{said.type}: {said.text}") if said.type in ("error", "warning") else None)
        page.goto(f"{url}/bench")
        page.evaluate("""async () => {
            const { createRenderer } = await import("/web/render/markdown.js")
            window.out = document.getElementById("out")
            const { copy } = await import("/web/app/dom.js")
            window.copied = []
            window.begin = (where = out) => (window.renderer = createRenderer(where, { onCopy: (text) => copied.push(text) && copy(text) }))
            window.whole = (text) => { const it = document.createElement("main"); const r = begin(it); r.update(text); r.finish(); return it }
        }""")

    def refuse(self, route: Route) -> None:
        self.problems.append(f"request: {route.request.url}")
        route.abort()

    def show(self, text: str) -> None:
        """The whole of a finished answer."""
        self.page.evaluate("(text) => { begin(); renderer.update(text); renderer.finish() }", text)

    def stream(self, text: str) -> None:
        """An answer that is still being written."""
        self.page.evaluate("(text) => { begin(); for (let i = 1; i <= text.length; i++) renderer.update(text.slice(0, i)) }", text)

    def html(self) -> str:
        return str(self.page.evaluate("out.innerHTML"))

    def text(self, selector: str) -> list[str]:
        return self.page.locator(f"#out {selector}").all_text_contents()

    def count(self, selector: str) -> int:
        return self.page.locator(f"#out {selector}").count()

    def picture(self, name: str) -> None:
        folder = os.environ.get("QWEN2_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(folder) / f"render-{name}.png"), full_page=True)


@pytest.fixture(scope="module")
def opened(browser: Browser) -> Iterator[Bench]:
    """One page for all tests, from a server that has nothing but the page's files."""
    app = FastAPI()
    add_page(app)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    context = browser.new_context(viewport=SIZE, reduced_motion="reduce")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield Bench(context.new_page(), f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    context.close()
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def bench(opened: Bench) -> Iterator[Bench]:
    opened.page.set_viewport_size(SIZE)
    opened.page.evaluate("() => { copied.length = 0; document.documentElement.dataset.theme = 'light' }")
    yield opened
    problems, opened.problems = opened.problems, []
    assert problems == []
