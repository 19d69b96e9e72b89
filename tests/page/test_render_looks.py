"""What a rendered answer looks like, while it comes and when it is complete, and what can be done with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.page.answers import MARKDOWN

if TYPE_CHECKING:
    from tests.page.renderer import Bench

pytest_plugins = ["tests.page.renderer"]


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
        "kinds of maths",
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
