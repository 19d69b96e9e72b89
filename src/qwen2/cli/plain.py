"""Text of others on the screen or through a pipe, as it is but for what a terminal would obey. Imports next to nothing.

stream = PlainStream(); stream.push("As it comes."); stream.close()
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing import TextIO

# Escape and the other control characters become visible symbols; overrides of the writing direction and C1 controls (the 8-bit
# escape introducers) become U+FFFD; a carriage return, which would let text overwrite text, goes.
UNSAFE: dict[int, int | None] = {
    **{code: 0x2400 + code for code in range(32)},
    **dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
    0x7F: 0x2421,
    0x09: 0x09,
    0x0A: 0x0A,
    0x0D: None,
}


def neutralise(text: str) -> str:
    """The text without anything that a terminal would obey, other than tab and newline."""
    return text.translate(UNSAFE)


class Renderer(Protocol):
    """What an answer is written to."""

    def push(self, text: str) -> None: ...

    def close(self) -> None: ...


class PlainStream:
    """The text as it comes. Into a pipe it is passed on byte for byte; on a terminal control characters are made visible."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = sys.stdout if file is None else file
        self.safe = self.file.isatty()
        self.last = "\n"

    def push(self, text: str) -> None:
        if text:
            self.last = text[-1]
            self.file.write(neutralise(text) if self.safe else text)
            self.file.flush()

    def close(self) -> None:
        if self.last != "\n":
            self.push("\n")
