"""Markdown as it streams, in a real browser: harmless, the same however it was cut, at a constant cost, and as it should look."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, Route, ViewportSize, expect

from qwen2.server.page import HEADERS, add_page
from tests.page.answers import HOSTILE, MARKDOWN

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


# --- harm


def test_hostile_answers_do_nothing(bench: Bench) -> None:
    """Whole, and at every length while they come: no script, no dialog, no request, nothing but the elements of the list."""
    strange = bench.page.evaluate(
        """async (texts) => {
            const allowed = "A BLOCKQUOTE BR BUTTON CODE DIV EM H1 H2 H3 H4 H5 H6 HR KBD LI OL P PRE S SPAN STRONG SUB SUP TABLE TBODY TD TH THEAD TR UL"
            const known = new Set(allowed.split(" "))
            const found = []
            const look = (text) => {
                for (const one of out.querySelectorAll("*")) {
                    if (one.closest(".katex")) continue
                    if (!known.has(one.tagName)) found.push(`${one.tagName} in ${text}`)
                    for (const { name, value } of one.attributes) {
                        if (/^on|^(id|name|style|src|srcset|srcdoc|ping|action)$/.test(name)) found.push(`${name} in ${text}`)
                        if (name === "href" && !/^(https?:\\/\\/|mailto:)/.test(value)) found.push(`${value} in ${text}`)
                    }
                    if (one.tagName === "A" && one.href && (one.target !== "_blank" || one.rel !== "noopener noreferrer")) found.push(`link in ${text}`)
                }
                for (const one of out.querySelectorAll(".katex *")) {
                    if (/^(a|img|script|iframe|style)$/i.test(one.tagName)) found.push(`${one.tagName} in ${text}`)
                    if (/url/.test(one.getAttribute("style") ?? "")) found.push(`style in ${text}`)
                    if (one.id || one.getAttribute("href")) found.push(`id or href in ${text}`)
                }
            }
            for (const text of texts) {
                begin()
                for (let i = 1; i <= text.length; i++) { renderer.update(text.slice(0, i)); look(text) }
                renderer.finish()
                look(text)
                for (const one of out.querySelectorAll("*")) one.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }))
                await new Promise((done) => setTimeout(done, 10))
            }
            return found
        }""",
        HOSTILE,
    )
    assert strange == []
    assert bench.page.evaluate("typeof document.cookie + typeof document.createElement + location.pathname") == "stringfunction/bench"


def test_tags_in_an_answer_are_shown_as_they_were_written(bench: Bench) -> None:
    bench.show("<img src=x onerror=alert(1)> <script>alert(1)</script>\n\n[x](javascript:alert(1))")
    assert bench.text("p") == ["<img src=x onerror=alert(1)> <script>alert(1)</script>", "[x](javascript:alert(1))"]


@pytest.mark.parametrize(
    "deep", [">" * 5000 + " x", "- " * 3000 + "x", "*a _b " * 3000, "[" * 20000, "$" + "{" * 5000 + "$", "**" * 20000, "`" * 9999 + "a"]
)
def test_huge_nesting_ends(bench: Bench, deep: str) -> None:
    bench.show(deep)
    assert bench.count("*") > 0


def test_what_is_nested_too_deeply_is_not_lost(bench: Bench) -> None:
    bench.show("before\n\n" + ">" * 200 + " here\n\nafter")
    assert bench.text("pre") == [">" * 200 + " here"]
    assert bench.text("> p") == ["before", "after"]


# --- the same however it was cut


@pytest.mark.parametrize("name", MARKDOWN)
def test_cut_at_every_character_the_result_is_the_same(bench: Bench, name: str) -> None:
    """Character by character, and in two pieces cut at each place."""
    differences = bench.page.evaluate(
        """(text) => {
            const wanted = whole(text)
            const found = []
            begin()
            for (let i = 1; i <= text.length; i++) renderer.update(text.slice(0, i))
            renderer.finish()
            if (!wanted.isEqualNode(Object.assign(out.cloneNode(true), { id: "" })) && wanted.innerHTML !== out.innerHTML) {
                found.push(["all", wanted.innerHTML, out.innerHTML])
            }
            for (let i = 1; i < text.length && found.length === 0; i++) {
                begin()
                renderer.update(text.slice(0, i))
                renderer.update(text)
                renderer.finish()
                if (wanted.innerHTML !== out.innerHTML) found.push([text.slice(0, i), wanted.innerHTML, out.innerHTML])
            }
            return found
        }""",
        MARKDOWN[name],
    )
    assert differences == [], json.dumps(differences, ensure_ascii=False)


@pytest.mark.parametrize("name", MARKDOWN)
def test_blocks_are_those_of_the_text_read_at_once(bench: Bench, name: str) -> None:
    """The oracle of reading by blocks: one plain reading of the whole text."""
    same = bench.page.evaluate(
        """async (text) => {
            const { md } = await import("/web/render/syntax.js")
            const { sanitise } = await import("/web/render/sanitise.js")
            const plain = document.createElement("main")
            plain.append(...sanitise(md.render(text)).children)
            const ours = whole(text)
            for (const one of ours.querySelectorAll(".code-head")) one.remove()
            const read = (root) => [...root.children].map((one) => [one.tagName, one.querySelector(".maths") || one.matches(".maths") ? "" : one.textContent])
            return [read(plain), read(ours)]
        }""",
        MARKDOWN[name],
    )
    assert same[0] == same[1]


# --- at a constant cost


def test_what_is_complete_is_never_touched_again(bench: Bench) -> None:
    """Of a hundred answers' worth of text, each further character changes nodes of the last block only."""
    touched = bench.page.evaluate(
        """async (text) => {
            begin()
            const long = (text + "\\n\\n").repeat(20)
            renderer.update(long)
            const before = [...out.children]
            let outside = 0, changes = 0
            const watch = new MutationObserver((records) => {
                for (const one of records) {
                    changes++
                    if (before.slice(0, -1).some((node) => node.contains(one.target))) outside++
                    outside += [...one.removedNodes].filter((node) => before.slice(0, -1).includes(node)).length
                }
            })
            watch.observe(out, { childList: true, subtree: true, characterData: true, attributes: true })
            for (let i = 1; i <= text.length; i++) renderer.update(long + text.slice(0, i))
            await new Promise((done) => setTimeout(done))
            renderer.finish()
            await new Promise((done) => setTimeout(done))
            return { outside, changes, same: before.slice(0, -1).every((node, at) => out.children[at] === node), blocks: before.length }
        }""",
        MARKDOWN["ordinary"],
    )
    assert touched["outside"] == 0
    assert touched["same"]
    assert touched["changes"] > 100
    assert touched["blocks"] > 140


def test_only_the_last_block_is_read_again(bench: Bench) -> None:
    """Counted, not timed: characters that the parser reads per update do not grow with what is complete."""
    read = bench.page.evaluate(
        """async (text) => {
            const { md } = await import("/web/render/syntax.js")
            const parse = md.parse
            let characters = 0
            md.parse = function (source, env) { characters += source.length; return parse.call(this, source, env) }
            const count = (before) => {
                begin()
                renderer.update(before)
                characters = 0
                for (let i = 1; i <= text.length; i++) renderer.update(before + text.slice(0, i))
                return characters
            }
            const counts = [1, 100].map((times) => count((text + "\\n\\n").repeat(times)))
            md.parse = parse
            return counts
        }""",
        MARKDOWN["ordinary"],
    )
    assert read[0] == read[1] > 0


def test_a_block_that_is_being_written_keeps_what_did_not_change(bench: Bench) -> None:
    """In a long list the earlier items, with their code and formulas, stay the same nodes."""
    kept = bench.page.evaluate(
        """() => {
            begin()
            const start = "1. One $x^2$\\n\\n   ```js\\n   let a = 1\\n   ```\\n\\n2. Two **b**\\n\\n3. Thr"
            renderer.update(start)
            const nodes = [...out.querySelectorAll("li:nth-child(-n+2) *")]
            renderer.update(start + "ee and more")
            renderer.update(start + "ee and more\\n\\n4. Four")
            return { all: nodes.length, same: nodes.filter((node) => out.contains(node)).length }
        }"""
    )
    assert kept["all"] == kept["same"] > 30


def test_code_is_coloured_seldom_while_it_comes(bench: Bench) -> None:
    counts = bench.page.evaluate(
        """async () => {
            const hljs = (await import("/web/vendor/highlight/core.js")).default
            const highlight = hljs.highlight
            let calls = 0
            hljs.highlight = function (...given) { calls++; return highlight.apply(this, given) }
            const text = "```python\\n" + "x = f(1, 'two')  # three\\n".repeat(200)
            begin()
            for (let i = 4; i < text.length + 4; i += 4) renderer.update(text.slice(0, i))
            const during = calls
            const shown = out.querySelector("code").textContent === text.slice(10)
            renderer.update(text + "```\\n\\nend")
            const closing = calls - during
            renderer.finish()
            hljs.highlight = highlight
            return { during, shown, closing, after: calls - during - closing, coloured: out.querySelectorAll(".hljs-string").length }
        }"""
    )
    assert counts["during"] < 60
    assert counts["shown"]
    assert (counts["closing"], counts["after"], counts["coloured"]) == (1, 0, 200)


# --- as it comes


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Some **bold te", '<p dir="auto">Some <strong>bold te</strong></p>'),
        ("Some **", '<p dir="auto">Some</p>'),
        ("Some **bold*", '<p dir="auto">Some <strong>bold</strong></p>'),
        ("a `cod", '<p dir="auto">a <code>cod</code></p>'),
        ("a `", '<p dir="auto">a</p>'),
        ("see [the docs](https://exa", '<p dir="auto">see <a>the docs</a></p>'),
        ("2 * 3 and snake_case", '<p dir="auto">2 * 3 and snake_case</p>'),
        ("A title\n--", '<p dir="auto">A title</p>'),
        ("Text\n\n-", '<p dir="auto">Text</p>'),
        ("Text\n\n#", '<p dir="auto">Text</p>'),
        ("Text\n\n``", '<p dir="auto">Text</p>'),
    ],
)
def test_half_a_mark_looks_calm(bench: Bench, text: str, shown: str) -> None:
    bench.stream(text)
    assert bench.html().replace("\n", " ").replace("Some </p>", "Some </p>") == shown.replace("Some </p>", "Some </p>")


def test_half_a_fence_and_half_a_table(bench: Bench) -> None:
    bench.stream("```py")
    assert bench.text(".code-language") == ["Text"]
    bench.stream("```python\nx = 1\n``")
    assert (bench.text("code"), bench.text(".code-language")) == (["x = 1\n"], ["Python"])
    for head in ("| a | b", "| a | b |\n", "| a | b |\n|-", "| a | b |\n|---|---|", "| a | b |\n|---|---|\n"):
        bench.stream(head)
        assert [one.strip() for one in bench.text("th")] == ["a", "b"], head
    bench.stream("\\[\n\\frac{1}{")
    assert bench.count(".maths.pending") == 1
    assert bench.count(".katex") == 0


def test_a_text_that_was_replaced_begins_anew(bench: Bench) -> None:
    bench.page.evaluate(
        "() => { begin(); renderer.update('# One\\n\\nTwo'); renderer.finish(); renderer.update('Three'); renderer.finish() }"
    )
    assert bench.html() == '<p dir="auto">Three</p>'
    bench.page.evaluate(
        "() => { renderer.update('Three *four*\\n\\n'); renderer.update('Three *four*\\n\\nfive'); renderer.finish(); renderer.finish() }"
    )
    assert bench.html() == '<p dir="auto">Three <em>four</em></p><p dir="auto">five</p>'


# --- what it looks like


@pytest.mark.parametrize("code", ["a = 1\n\n\tb < c && d\n  ", "", "\n\nx", "one line", "<b>&amp;</b>"])
def test_copied_code_is_the_exact_text(bench: Bench, code: str) -> None:
    bench.show(f"```js\n{code}\n```\n\n1. x\n   ```\n   y\n   ```\n")
    bench.page.locator("#out .code-copy").first.click()
    expect(bench.page.locator("#out .code-copy").first).to_have_text("Copied")
    assert bench.page.evaluate("navigator.clipboard.readText()") == code
    bench.page.locator("#out .code-copy").last.click()
    expect(bench.page.locator("#out .code-copy").last).to_have_text("Copied")
    assert bench.page.evaluate("copied") == [code, "y"]


def test_long_lines_can_be_wrapped(bench: Bench) -> None:
    bench.show("```\nshort\n```\n\n```\n" + "long " * 60 + "\n```\n")
    first, last = bench.page.locator("#out .code-wrap").first, bench.page.locator("#out .code-wrap").last
    assert not first.is_visible()
    overflow = "() => { const pre = out.querySelectorAll('pre')[1]; return pre.scrollWidth > pre.clientWidth }"
    assert bench.page.evaluate(overflow)
    last.click()
    assert last.get_attribute("aria-pressed") == "true"
    assert not bench.page.evaluate(overflow)


def test_money_is_no_formula_and_formulas_are(bench: Bench) -> None:
    bench.show(MARKDOWN["money"])
    assert bench.count(".maths") == 0
    bench.show(MARKDOWN["inline maths"])
    assert bench.page.locator("#out .katex").count() == 7
    assert bench.page.locator("#out .katex-display").count() == 2
    bench.show(MARKDOWN["display maths"])
    assert bench.page.locator("#out .katex-display").count() == 5


def test_a_formula_is_laid_out_under_the_policy(bench: Bench) -> None:
    """KaTeX's styles and fonts are applied: a fraction has its parts above each other, in KaTeX's own letters."""
    bench.show("$$\\frac{a}{b}$$")
    bench.page.evaluate("document.fonts.ready")
    places = bench.page.evaluate(
        "[...out.querySelectorAll('.mfrac .mord.mathnormal')].map((one) => [one.textContent, one.getBoundingClientRect().top])"
    )
    tops = dict(places)
    assert tops["a"] + 10 < tops["b"]
    assert bench.page.evaluate("document.fonts.check('16px KaTeX_Math')")
    assert bench.count("math annotation") == 1


def test_bad_formulas_show_their_source_and_why(bench: Bench) -> None:
    bench.show("$\\frac{1}$ and $$\\nosuchcommand{x}$$")
    assert bench.text(".maths.bad") == ["$\\frac{1}$", "$$\\nosuchcommand{x}$$"]
    assert "nosuchcommand" in str(bench.page.locator("#out .bad").last.get_attribute("title"))


def test_images_are_links_that_load_nothing(bench: Bench) -> None:
    bench.show(MARKDOWN["images"])
    links = bench.page.evaluate("[...out.querySelectorAll('a')].map((a) => [a.textContent, a.href, a.target, a.rel])")
    blank = ["_blank", "noopener noreferrer"]
    assert links == [
        ["A cat", "https://x.example/cat.png", *blank],
        ["badge", "https://x.example/", *blank],
        ["image", "https://x.example/none.png", *blank],
    ]


def test_each_block_has_the_direction_of_its_text(bench: Bench) -> None:
    bench.show(MARKDOWN["scripts"])
    directions = bench.page.evaluate("[...out.children].map((one) => getComputedStyle(one).direction)")
    assert directions == ["rtl", "rtl", "ltr", "rtl"]
    bench.show("\u0645\u0631\u062d\u0628\u0627\n\n```\ncode\n```\n\n$$x$$")
    assert bench.page.evaluate("[...out.children].map((one) => getComputedStyle(one).direction)") == ["rtl", "ltr", "ltr"]


def test_tasks_and_alignments(bench: Bench) -> None:
    bench.show(MARKDOWN["tasks"])
    boxes = bench.page.evaluate("[...out.querySelectorAll('.task')].map((one) => one.getAttribute('aria-label'))")
    assert boxes == ["to do", "done", "done", "to do"]
    bench.show(MARKDOWN["table"])
    aligned = bench.page.evaluate("[...out.querySelectorAll('tbody tr:first-child td')].map((one) => getComputedStyle(one).textAlign)")
    assert aligned == ["left", "right", "center"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pictures(bench: Bench, theme: str) -> None:
    """For people to look at; that nothing is wider than the page is seen by the test."""
    bench.page.evaluate("(theme) => (document.documentElement.dataset.theme = theme)", theme)
    bench.page.evaluate(
        "Object.assign(document.body.style, { overflow: 'auto', height: 'auto' }); Object.assign(out.style, { maxWidth: '46rem', margin: '1.5rem auto', padding: '0 1rem' })"
    )
    for name in (
        "ordinary",
        "headings",
        "display maths",
        "inline maths",
        "scripts",
        "table",
        "tasks",
        "quotes",
        "loose",
        "bad maths",
        "breaks",
    ):
        bench.show(MARKDOWN[name])
        bench.picture(f"{name.replace(' ', '-')}-{theme}")
        assert bench.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    bench.page.set_viewport_size({"width": 360, "height": 700})
    bench.show(
        MARKDOWN["ordinary"]
        + "\n\n```js\n"
        + "let x = 1; " * 30
        + "\n```\n\n$$"
        + "x + " * 60
        + "x$$\n\n"
        + "|a long head" * 8
        + "|\n"
        + "|---" * 8
        + "|\n"
    )
    bench.picture(f"phone-{theme}")
    assert bench.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
