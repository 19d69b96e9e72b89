"""Markdown as it streams, in a real browser: harmless, the same however it was cut, at a constant cost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.page.answers import HOSTILE, MARKDOWN

if TYPE_CHECKING:
    from tests.page.renderer import Bench

pytest_plugins = ["tests.page.renderer"]


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
