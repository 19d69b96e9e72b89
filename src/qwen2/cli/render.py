"""Shows an answer on a terminal while it is being written, as styled Markdown.

How the terminal stays calm: a block (an item of a list, some lines of code) that is finished is printed once; only the block still
growing is drawn again, from its first line that changed. A token therefore costs the same at the end of a long answer as at its
beginning, and nothing on the screen moves that did not change.

What is left out: a change of the terminal's size while a block grows is met by counting its lines anew, no more.

    with_style = MarkdownStream(Console()); with_style.push("# A *title*"); with_style.close()
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.syntax import Syntax

from qwen2.cli.markdown import MarkdownLines, make_parser
from qwen2.cli.plain import neutralise

if TYPE_CHECKING:
    from markdown_it.token import Token
    from rich.console import Console

ESCAPE = "\x1b["
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CALM, SHOW = ESCAPE + "?2026h", ESCAPE + "?2026l"  # synchronized output: a terminal that does not know it ignores it
LONGEST_CHUNK = 80  # lines of code highlighted together at most
SLOW_SOURCE = 2000  # characters of one growing block after which it is drawn with every second piece, then every third, ...


class Screen:
    """The lines under the cursor that may still change. The cursor rests at the end of the last of them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.shown: list[str] = []
        self.settled: list[str] = []  # the last final line, kept while nothing follows it, because the cursor is on it

    def draw(self, final: list[str], live: list[str]) -> None:
        """Show the final lines, never to be touched again, and the live ones after them, changing as little as possible."""
        lines = self.settled + final + live
        self._change(lines)
        kept = len(live) if live else min(1, len(lines))
        self.settled = lines[-1:] if not live else []
        self.shown = lines[len(lines) - kept :]

    def _change(self, lines: list[str]) -> None:
        same = 0
        while same < min(len(lines), len(self.shown)) and lines[same] == self.shown[same]:
            same += 1
        if same == len(lines) == len(self.shown):
            return
        if same == len(self.shown):  # only new lines
            out = "\n" if same else ""
        elif same == len(self.shown) - 1 < len(lines) and lines[same].startswith(self.shown[same]):  # only more of the last line
            out = ""
            lines = [*lines[:same], lines[same].removeprefix(self.shown[same]), *lines[same + 1 :]]
        else:
            same = max(min(same, len(lines) - 1), self._first_reachable(), 0)
            up = sum(map(self._rows, self.shown[same:])) - 1
            out = "\r" + (f"{ESCAPE}{up}A" if up else "")
            lines = [*lines[:same], *map(self._over, lines[same:-1]), *(self._over(line, "J") for line in lines[-1:])]
            out += "" if lines else ESCAPE + "J"
        self._write(out + "\n".join(lines[same:]))

    def _over(self, line: str, erase: str = "K") -> str:
        """The line, written over what is there: erased is only what it leaves, so that nothing blinks, and tmux, which keeps what an
        erasure from the corner removes, has nothing to keep. A line that fills its row is the exception: erasing there takes its end."""
        cells = cell_len(COLOUR.sub("", line))
        return f"{ESCAPE}{erase}{line}" if cells and cells % self.console.width == 0 else f"{line}{ESCAPE}{erase}"

    def _first_reachable(self) -> int:
        """The first shown line that has not scrolled off the top."""
        room = self.console.height - 1
        first = len(self.shown)
        while first and room >= self._rows(self.shown[first - 1]):
            first -= 1
            room -= self._rows(self.shown[first])
        return min(first, len(self.shown) - 1)

    def _rows(self, line: str) -> int:
        return max(1, -(-cell_len(COLOUR.sub("", line)) // self.console.width))

    def _write(self, out: str) -> None:
        calm = ESCAPE in out and "\n" in out
        self.console.file.write(CALM + out + SHOW if calm else out)
        self.console.file.flush()


class Code:
    """A fenced block that is still open."""

    def __init__(self, opening: str, markup: str, info: str) -> None:
        self.language = info.split()[0] if info.strip() else ""
        self.indent = re.compile(f" {{0,{len(opening) - len(opening.lstrip(' '))}}}")
        self.closing = re.compile(rf" {{0,3}}{re.escape(markup[0])}{{{len(markup)},}}[ \t]*")
        self.markup = markup[0]
        self.chunk: list[str] = []  # complete lines that are not final

    def add(self, line: str) -> None:
        self.chunk.append(self.indent.sub("", line, count=1))

    def may_close(self, line: str) -> bool:
        return bool(line.strip()) and not line.strip().strip(self.markup)

    def seam(self) -> int:
        """How many lines of the chunk can be cut off without changing how the next ones are highlighted.

        A cut is safe before a line that starts at the margin, outside strings and comments: colouring starts afresh there. Where no
        such line comes for long, any line break outside a string has to do.
        """
        lexer = Syntax("", self.language or "text").lexer
        if lexer is None:
            return len(self.chunk)
        outside: set[int] = set()  # numbers of the lines whose end is in no string and no comment
        number = 0
        for kind, text in lexer.get_tokens("\n".join(self.chunk) + "\n"):
            names = set(kind)  # a token's kind is a path of names, and its own "in" asks for something else
            inside = "String" in names or ("Comment" in names and "Single" not in names)
            breaks = text.count("\n")
            outside.update(() if inside else range(number + 1, number + breaks + 1))
            number += breaks
        safe = [k for k in outside if k < len(self.chunk) and self.chunk[k][:1].strip()]
        if not safe and len(self.chunk) >= LONGEST_CHUNK:
            return max((k for k in outside if k < len(self.chunk)), default=len(self.chunk))
        return max(safe, default=0)


class MarkdownStream:
    """Markdown that arrives piece by piece. Whatever the pieces, the screen ends up as if the text had come at once."""

    def __init__(self, console: Console) -> None:
        self.screen = Screen(console)
        self.markdown = MarkdownLines(console)
        self.blocks = make_parser()
        self.blocks.core.ruler.disable(["inline"])  # only the borders of blocks are wanted
        self.source = ""  # of the blocks that are not final
        self.gap: list[str] = []  # the blank line before the next block
        self.number: int | None = None  # of the first item in the source, where an ordered list goes on
        self.code: Code | None = None
        self.skipped = 0

    def push(self, text: str) -> None:
        text = neutralise(text)
        self.source += text
        final = self._settle() if "\n" in text else []
        self.skipped += 1
        if final or self.skipped > len(self.source) // SLOW_SOURCE:
            self.skipped = 0
            self.screen.draw(final, self._growing())

    def close(self) -> None:
        """Finish the last block and end its line."""
        body, newline, tail = self.source.rpartition("\n")
        self.source = self.source + "\n" if tail.strip() else body + newline
        final = self._settle()
        if self.code is not None:
            final += self._end_code()
        elif self.source.strip("\n"):
            final += self._commit(self.source)
        self.source = ""
        self.screen.draw(final, [])
        if self.screen.shown:
            self.screen.console.file.write("\n")
            self.screen.console.file.flush()

    def _growing(self) -> list[str]:
        """Lines of what is not final."""
        if self.code is not None:
            tail = [] if not self.source or self.code.may_close(self.source) else [self.source]
            return self._code_lines(self.code.chunk + tail)
        lines = self.markdown.lines(self.source, live=True, number=self.number) if self.source.strip() else []
        return self.gap + lines if lines else []

    def _settle(self) -> list[str]:
        """Take the finished blocks out of the source; their lines."""
        final: list[str] = []
        while True:
            before = len(self.source)
            final += self._settle_code() if self.code is not None else self._settle_blocks()
            if len(self.source) == before:
                return final

    def _settle_blocks(self) -> list[str]:
        tokens = [token for token in self.blocks.parse(self.source[: self.source.rfind("\n") + 1]) if token.nesting >= 0]
        top = [token for token in tokens if token.level == 0]
        if not top:
            return []
        last, start = top[-1], first_line(top[-1])
        items = [first_line(t) for t in tokens if t.level == 1 and t.type == "list_item_open" and first_line(t) >= start]
        lines = self.source.split("\n")
        cut = items[-1] if items else start
        self.source = "\n".join(lines[cut:])
        number = self.number if len(top) == 1 and self.number is not None else int(last.attrs.get("start", 1))
        final = self._commit("\n".join(lines[:cut])) if cut else []
        if items and last.type == "ordered_list_open":
            self.number = number + len(items) - 1
        follows = len(items) > 1 or (items and len(top) > 1 and top[-2].type == "paragraph_open")
        if follows and lines[cut - 1].strip():
            self.gap = []  # as in the source, no blank line
        if last.type == "fence":
            self.source = "\n".join(lines[start + 1 :])
            self.code = Code(lines[start], last.markup, last.info)
            final += [*self.gap, self.markdown.rule(self.code.language)]
            self.gap = []
        return final

    def _commit(self, source: str) -> list[str]:
        """Final lines of whole blocks."""
        if not source.strip():
            return []
        lines = self.gap + self.markdown.lines(source, number=self.number)
        self.number, self.gap = None, [""]
        return lines

    def _settle_code(self) -> list[str]:
        code = self.code
        assert code is not None
        *complete, self.source = self.source.split("\n")
        for k, line in enumerate(complete):
            if code.closing.fullmatch(line):
                self.source = "\n".join([*complete[k + 1 :], self.source])
                return self._end_code()
            code.add(line)
        cut = code.seam() if complete else 0
        done, code.chunk = code.chunk[:cut], code.chunk[cut:]
        return self._code_lines(done)

    def _end_code(self) -> list[str]:
        assert self.code is not None
        lines = [*self._code_lines(self.code.chunk), self.markdown.rule()]
        self.code, self.gap = None, [""]
        return lines

    def _code_lines(self, lines: list[str]) -> list[str]:
        assert self.code is not None
        return self.markdown.code("\n".join(lines), self.code.language) if lines else []


def first_line(token: Token) -> int:
    assert token.map is not None, f"{token.type} has no lines"
    return token.map[0]
