"""What the screen shows while an answer streams. The witness is pyte, a terminal emulator that knows nothing of us."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pyte
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from qwen2.cli.markdown import MarkdownLines, balanced
from qwen2.cli.plain import PlainStream, neutralise
from qwen2.cli.render import COLOUR, MarkdownStream

WIDTH, HEIGHT = 60, 24
DOCUMENT = '''# Grouped-query attention
**GQA** shares *keys* and values; see `model.py` and [the paper](https://arxiv.org/abs/2305.13245).
A second line, <b>not</b> HTML.
## Steps
1. First, install it, which takes a sentence that is too long for one line of this narrow screen:
   ```bash
   pip install qwen2  # yes
   ```
2. **Then** run
   - nested
   - nested two
3. Finally

> A quote with `code`
> - and a list

- loose

  with a paragraph
- second \u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587
  \u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587
* another list
```python
def f(x):
    """Doc

string."""
    return x + 1  # comment


class A:
    text = "a string that makes this line much longer than the sixty columns of the screen"
```
Title
=====

| name | value |
|:-----|------:|
| a    | 1.5   |
| \u4e2d\u6587 | **22** |

---
Bye ~~gone~~.
~~~
last code, never closed
'''


class Terminal(io.StringIO):
    """A file whose other end is a terminal of WIDTH x HEIGHT that remembers what scrolled off."""

    def __init__(self) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(WIDTH, HEIGHT, history=10_000)
        self.screen.set_mode(pyte.modes.LNM)  # a newline returns the carriage, as a terminal's driver has it
        self.stream = pyte.Stream(self.screen)
        self.written = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.stream.feed(text)
        self.written += len(text)
        return len(text)

    def rows(self) -> list[str]:
        past = ["".join(row[x].data for x in range(WIDTH)) for row in self.screen.history.top]
        return [row.rstrip() for row in [*past, *self.screen.display]]

    def text(self) -> str:
        return "\n".join(self.rows()).rstrip()


def console_on(file: io.StringIO) -> Console:
    return Console(file=file, force_terminal=True, width=WIDTH, height=HEIGHT, color_system="standard", legacy_windows=False)


def streamed(pieces: list[str]) -> str:
    terminal = Terminal()
    stream = MarkdownStream(console_on(terminal))
    for piece in pieces:
        stream.push(piece)
    stream.close()
    return terminal.text()


def at_once(source: str) -> str:
    """The oracle: every block of the whole text rendered together, written once, without a cursor movement."""
    terminal = Terminal()
    lines = MarkdownLines(console_on(io.StringIO())).lines(neutralise(source))
    terminal.write("\n".join(lines))
    return terminal.text()


def cut(text: str, places: list[int]) -> list[str]:
    borders = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(borders)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_streamed_document_ends_as_if_printed_at_once(size):
    assert streamed([DOCUMENT[k : k + size] for k in range(0, len(DOCUMENT), size)]) == at_once(DOCUMENT)


BLOCKS = [
    *("# h\n", "para **bold** text\n", "more `code\n", "word", " ", "**", "`", "\\", "\t", "<p>\n", "x" * 70, "\u4e2d\u6587"),
    *("- a\n", "- b\n", "  deep\n", "1. one\n", "7. x\n", "2) y\n", "* star\n", "   - sub\n", "    indented\n", "> quote\n"),
    *("```python\nx = 1\n", "```\n", "~~~\n", "a | b\n", "---|---\n", "---\n", "===\n", "\n", "\n\n"),
    *("[a](http://b.c)", "[x]: http://y\n"),
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(BLOCKS), max_size=14).map("".join), st.lists(st.integers(0, 400), max_size=30))
@example("- a\n- b\n\n- c\n* d\n", [1, 5, 9])
@example("9. a\n2. b\n3. c\ntext\n\nend", [7, 12])
@example("text\n- a\n---\n", [9])
def test_any_document_at_any_cut_ends_as_if_printed_at_once(source, places):
    assert streamed(cut(source, places)) == at_once(source)


def test_colours_do_not_depend_on_the_pieces():
    code = "```python\n" + 'def f():\n    """Doc\n\nstring."""\n    return 1\n\n\n' * 30 + "```\n"
    whole, pieces = io.StringIO(), io.StringIO()
    for file, size in ((whole, len(code)), (pieces, 5)):
        stream = MarkdownStream(console_on(file))
        for k in range(0, len(code), size):
            stream.push(code[k : k + size])
        stream.close()
    expected = MarkdownLines(console_on(io.StringIO())).lines(code)
    assert re.sub(r"\x1b\[\?2026[hl]", "", whole.getvalue()).split("\n") == [*expected, ""]
    screens = []
    for file in (whole, pieces):
        terminal = Terminal()
        terminal.write(file.getvalue())
        rows = [*terminal.screen.history.top, *(terminal.screen.buffer[y] for y in range(HEIGHT))]
        screens.append([(row[x].data, row[x].fg) for row in rows for x in range(WIDTH) if row[x].data != " "])
    assert screens[0] == screens[1]


LINES = ["- an item of the list\n", "A paragraph of a few words.\n\n", "x = f(x)  # code\n", "| a | b |\n|--|--|\n| 1 | 2 |\n\n"]


@pytest.mark.parametrize("line", LINES)
def test_a_piece_costs_the_same_late_as_early(line):
    """What is written for the last lines of a long answer is what was written for the first ones."""
    terminal = Terminal()
    stream = MarkdownStream(console_on(terminal))
    if line.startswith("x"):
        stream.push("```python\n")
    costs = []
    for _ in range(150):
        before = terminal.written
        for character in line:
            stream.push(character)
        costs.append(terminal.written - before)
    assert max(costs[100:]) <= max(costs[10:60])
    assert len(stream.source) + sum(map(len, stream.code.chunk if stream.code else [])) <= 2 * len(line) + 10


def test_finished_lines_are_never_written_again():
    file = io.StringIO()
    stream = MarkdownStream(console_on(file))
    source = "First paragraph.\n\nSecond one, long enough to fill more than one line of sixty columns, surely.\n\nThird."
    for k, character in enumerate(source):
        stream.push(character)
        assert COLOUR.sub("", file.getvalue()).count("First paragraph.") <= 1, k
    assert not re.search(r"\x1b\[\d*[AJK]", file.getvalue().split("Second")[0])


def test_growing_paragraph_taller_than_the_screen_keeps_its_text():
    text = " ".join(f"word{k}" for k in range(600))
    assert streamed([text[k : k + 3] for k in range(0, len(text), 3)]) == at_once(text)


def test_shorter_redraw_leaves_nothing_behind():
    """A row of dashes under a paragraph turns it into a heading; a table's rows become narrower than its source."""
    source = "a | long heading | c\n---|---|---\n1 | 2 | 3\n\nend"
    assert streamed(list(source)) == at_once(source)


ATTACKS = ["\x1b[31mred", "\x1b]0;title\x07", "\x1b]52;c;aGk=\x07", "\x9b2J", "a\rb", "\x1bc", "x\x08y", "\x7f", "\u202eevil", "\x00"]


PLACES = ["{}", "`{}`", "```\n{}\n```", "# {}", "| {} | b |\n|--|--|\n", "[{}](http://{})", "```{}\ncode\n```", "![{}](a)"]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("around", PLACES)
def test_no_control_character_of_the_model_reaches_the_terminal(attack, around):
    for make in (MarkdownStream, lambda console: PlainStream(console.file)):
        file = Terminal()
        written = []
        file.write = lambda text, written=written: written.append(text) or len(text)
        stream = make(console_on(file))
        for character in around.format(attack, attack):
            stream.push(character)
        stream.close()
        ours = re.sub(r"\x1b\[(\?2026[hl]|[0-9;]*[mAJK])|\n|\r", "", "".join(written))
        assert not re.search("[\x00-\x1f\x7f-\x9f\u202d\u202e]", ours)
        assert attack not in "".join(written)


def test_numeric_entities_cannot_smuggle_control_characters():
    file = io.StringIO()
    stream = MarkdownStream(console_on(file))
    stream.push("&#27;[31m &#x9b;2J &#x1b;c\n")
    stream.close()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", file.getvalue().replace("\x1b[0m", ""))


def test_a_link_shows_where_it_goes():
    assert streamed(["[my bank](http://evil.example)"]) == "my bank (http://evil.example)"
    assert streamed(["<http://a.example>"]) == "http://a.example"


def test_text_markdown_would_swallow_stays_visible():
    assert streamed(["<script>alert(1)</script>\n\n[1]: http://x.example\n"]) == "<script>alert(1)</script>\n\n[1]: http://x.example"


def test_pipe_gets_the_text_byte_for_byte_and_one_newline():
    file = io.StringIO()
    stream = PlainStream(file)
    for piece in ["**a**", "\x1b[31m", "\r\n", "b"]:
        stream.push(piece)
    stream.close()
    assert file.getvalue() == "**a**\x1b[31m\r\nb\n"
    stream.close()
    assert file.getvalue().endswith("b\n")


OPEN = {"**bo": "**bo**", "a **": "a ", "**bold*": "**bold**", "`co": "`co`", "a `": "a ", "a *": "a ", "**a** b": "**a** b"}


@pytest.mark.parametrize(("text", "expected"), OPEN.items())
def test_open_emphasis_is_closed_while_it_grows(text, expected):
    assert balanced(text) == expected


def test_half_written_marks_are_not_shown():
    terminal = Terminal()
    stream = MarkdownStream(console_on(terminal))
    seen = []
    for character in "text **bold** and\n- item\n":
        stream.push(character)
        seen.append(terminal.text())
    assert not any("*" in screen for screen in seen)
    assert not any(screen.endswith("-") for screen in seen)
    assert seen[-1] == "text bold and\n\u2022 item"
