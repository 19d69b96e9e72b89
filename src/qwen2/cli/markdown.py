"""Markdown to lines for a terminal: text a model wrote, made safe to print, then styled.

What is left out, and why:
1) HTML and link definitions: they are shown as they stand, because what the model wrote must not vanish;
2) hyperlink escapes: the address is printed beside its text, so that a link cannot lie about where it goes;
3) frames and indentation around code: what is selected with the mouse can be pasted and run.

    console = Console(); print(*MarkdownLines(console).lines("**Hello**"), sep="\\n")
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from rich import box
from rich.cells import cell_len
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from qwen2.cli.plain import neutralise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, RenderableType

WIDEST_PROSE = 100  # longer lines are hard to read
RULE = 40
OPENED = re.compile(r"\s*(?:[-=#*+>`~|:_ ]*|\d{1,3}[.)]?)\s*")  # the beginning of a line that may still become anything
BEGUN = re.compile(r"(?<!\S)[*_`~]+$")  # marks at the end that open something not yet there
STYLES = {"strong": "bold", "em": "italic", "s": "strike", "link": "underline"}
HEADINGS = {"h1": "bold underline magenta", "h2": "bold magenta"}
ALIGNED = {"text-align:right": "right", "text-align:center": "center"}


def make_parser() -> MarkdownIt:
    """CommonMark with tables and strikethrough; HTML and link definitions stay text, so no line depends on a later one."""
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("reference")


def balanced(text: str) -> str:
    """The text of an unfinished paragraph with its open emphasis or code closed, so that it does not change looks when they close."""
    text = BEGUN.sub("", text)
    for mark in ("`", "**"):
        bare = text.rstrip(mark[0] + " ")
        if bare.count(mark) % 2:
            return bare + mark
        if text.count(mark) % 2:
            return bare
    return text


@dataclass(frozen=True)
class MarkdownLines:
    """Renders whole blocks; the splitting of a stream into blocks is render.py's."""

    console: Console

    @cached_property
    def parser(self) -> MarkdownIt:
        return make_parser()

    @property
    def width(self) -> int:
        return max(10, min(self.console.width - 1, WIDEST_PROSE))

    def lines(self, source: str, live: bool = False, number: int | None = None) -> list[str]:
        """Styled lines of a piece of Markdown, without newlines.

        live: the piece is still growing, so its last line may be held back or its emphasis closed.
        number: the number of the first item, where the piece continues an ordered list.
        """
        if live:
            head, _, tail = source.rpartition("\n")
            source = head if OPENED.fullmatch(tail) else source
        tree = SyntaxTreeNode(self.parser.parse(source))
        if live:
            self._close_last_inline(tree)
        return self._blocks(tree.children, self.width, source.split("\n"), number)

    def code(self, source: str, language: str) -> list[str]:
        """Highlighted code, a line for a line, as long as it comes: the terminal wraps it, so that it can be copied."""
        text = Syntax("", language or "text", theme="ansi_dark", background_color="default").highlight(source.expandtabs(4))
        lines = text.split("\n", allow_blank=True)[: source.count("\n") + 1]  # lexers add a last newline
        return self._print(Text("\n").join(lines), soft=True)

    def rule(self, label: str = "") -> str:
        line = f"\u2500\u2500 {label} " if label else ""
        return self._print(Text(line + "\u2500" * max(0, min(RULE, self.width) - cell_len(line)), "dim"), soft=True)[0]

    def _close_last_inline(self, tree: SyntaxTreeNode) -> None:
        written = [node for node in tree.walk() if node.type == "inline" and node.content]
        if written and balanced(written[-1].content) != written[-1].content:
            inline = SyntaxTreeNode(self.parser.parseInline(balanced(written[-1].content)))
            written[-1].children = inline.children[0].children

    def _print(self, thing: RenderableType, width: int | None = None, soft: bool = False) -> list[str]:
        with self.console.capture() as captured:
            self.console.print(thing, width=width, soft_wrap=soft, end="")
        return [line.rstrip(" ") for line in captured.get().split("\n")]

    def _blocks(self, nodes: Sequence[SyntaxTreeNode], width: int, source: list[str], number: int | None = None) -> list[str]:
        lines: list[str] = []
        for k, node in enumerate(nodes):
            tight = k > 0 and is_list(node) and nodes[k - 1].type == "paragraph" and touching(node, source)
            lines += ([""] if k and not tight else []) + self._block(node, width, source, number if k == 0 else None)
        return lines

    def _block(self, node: SyntaxTreeNode, width: int, source: list[str], number: int | None) -> list[str]:
        if is_list(node):
            return self._list(node, width, source, number)
        if node.type == "blockquote":
            bar = self._print(Text("\u2502", "dim"), soft=True)[0]
            return [f"{bar} {line}" for line in self._blocks(node.children, max(10, width - 2), source)]
        if node.type in ("fence", "code_block"):
            language = node.info.split()[0] if node.info.strip() else ""
            code = self.code(node.content.removesuffix("\n"), language) if node.content else []
            return [self.rule(neutralise(language)), *code, self.rule()]
        if node.type == "hr":
            return [self.rule()]
        if node.type == "table":
            return self._print(table_of(node), width=max(10, self.console.width - 1))[:-1]  # a table ends its last line
        text = inline_text(node.children)
        if node.type == "heading":
            text.stylize(HEADINGS.get(node.tag, "bold"))
        return self._print(text, width=width)

    def _list(self, node: SyntaxTreeNode, width: int, source: list[str], number: int | None) -> list[str]:
        if number is None:
            number = int(node.attrs.get("start", 1))
        lines: list[str] = []
        for k, item in enumerate(node.children):
            mark = f"{number + k}. " if node.type == "ordered_list" else "\u2022 "
            body = self._blocks(item.children, max(10, width - len(mark)), source) or [""]
            indent = " " * len(mark)
            lines += [] if k == 0 or touching(item, source) else [""]
            lines += [mark + body[0], *(indent + line if line else "" for line in body[1:])]
        return lines


def is_list(node: SyntaxTreeNode) -> bool:
    return node.type in ("bullet_list", "ordered_list")


def touching(node: SyntaxTreeNode, source: list[str]) -> bool:
    """Whether the node's first line follows the line before it without a blank one between."""
    return node.map is not None and node.map[0] > 0 and bool(source[node.map[0] - 1].strip(" >"))


def inline_text(nodes: Sequence[SyntaxTreeNode], style: str = "") -> Text:
    """Styled text of inline nodes; a line break the model made is kept, as poems and addresses need it."""
    text = Text()
    for node in nodes:
        if node.type in ("softbreak", "hardbreak"):
            text.append("\n")
        elif node.type == "code_inline":
            text.append(neutralise(node.content), f"{style} cyan".strip())
        elif node.type == "image":
            text.append(neutralise(f"[{node.content}]({node.attrs['src']})"), style)
        elif node.children:
            text.append_text(inline_text(node.children, f"{style} {STYLES.get(node.type, '')}".strip()))
            address = str(node.attrs.get("href", ""))
            if address and address.removeprefix("mailto:") not in plain_text(node):
                text.append(neutralise(f" ({address})"), "dim")
        else:
            text.append(neutralise(node.content), style)
    return text


def plain_text(node: SyntaxTreeNode) -> str:
    return "".join(child.content or plain_text(child) for child in node.children)


def table_of(node: SyntaxTreeNode) -> Table:
    table = Table(box=box.ROUNDED, border_style="dim", header_style="bold")
    head, *bodies = node.children
    for cell in head.children[0].children:
        justify = ALIGNED.get(str(cell.attrs.get("style", "")), "left")
        table.add_column(inline_text(cell.children), justify=justify)  # type: ignore[arg-type]
    for body in bodies:
        for row in body.children:
            table.add_row(*(inline_text(cell.children) for cell in row.children))
    return table
