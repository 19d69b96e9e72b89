"""A call's arguments while they are being written: for calls whose form is certain, since what was given out cannot be taken back.

Left out: whether it is a call at all; `parse.py` says that at its end, from the whole of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from qwen2.tokenizer.messages import ToolCall

TOKEN = re.compile(r'\s*([{}\[\]:,]|"(?:[^"\\]|\\.)*"|[^\s{}\[\]:,"]+)', re.DOTALL)


@dataclass
class Nesting:
    """Where in a JSON text a reader is, after every character that it takes."""

    depth: int = 0  # brackets that are open
    in_string: bool = False
    _escaped: bool = False

    def take(self, char: str) -> None:
        """The next character."""
        if self._escaped:
            self._escaped = False
        elif self.in_string:
            self._escaped, self.in_string = char == "\\", char != '"'
        elif char == '"':
            self.in_string = True
        else:
            self.depth += (char in "{[") - (char in "}]")


@dataclass
class CallSoFar:
    """The body of one call, `write` being what stands before the name, between name and arguments, and after them."""

    write: tuple[str, str, str]
    name: str | None = None  # once it is complete
    arguments: str = ""  # what was given out of the JSON object
    _at: int = 0  # where the rest of them begins
    _nesting: Nesting = field(default_factory=Nesting)  # the object is over when no bracket is open

    @property
    def call(self) -> ToolCall | None:
        """As far as it goes, once its name is complete."""
        return None if self.name is None else ToolCall(self.name, self.arguments, cut=self._nesting.depth > 0)

    def look(self, body: str) -> tuple[str | None, str]:
        """The body so far, longer with every look -> the name, if it is new, and what is new of the arguments."""
        new = None
        if self.name is None:
            new = self._find_name(body)
            if new is None:
                return None, ""
        start = self._at
        while self._at < len(body) and (self._nesting.depth or (not self.arguments and self._at == start)):
            self._nesting.take(body[self._at])
            self._at += 1
        piece = body[start : self._at]
        self.arguments += piece
        return new, piece

    def _find_name(self, body: str) -> str | None:
        """The name, once the arguments begin."""
        before, between, _ = self.write
        end = body.find(between, len(before))
        at = end + len(between)
        while end >= 0 and body[at : at + 1].isspace():
            at += 1
        if not body.startswith(before) or end < 0 or body[at : at + 1] != "{":
            return None
        self.name, self._at = body[len(before) : end], at
        return self.name


def closed(text: str) -> str:
    """The beginning of a JSON object, cut anywhere -> an object of what is complete in it: no half name, number or text."""
    brackets: list[str] = []
    whole = "{}"
    at, value = 0, False  # whether a value is expected, which a name is not
    while (found := TOKEN.match(text, at)) is not None:
        token, at = found[1], found.end()
        if token in ("{", "["):
            brackets.append("}" if token == "{" else "]")
        elif token in ("}", "]"):
            brackets.pop()
        elif token == ":" or token == ",":
            value = token == ":"
            continue
        elif brackets[-1] == "}" and not value:
            continue  # a name
        elif token[0] != '"' and at == len(text):
            break  # a number or a word that may go on
        value = False
        whole = text[:at] + "".join(reversed(brackets))
    return whole
