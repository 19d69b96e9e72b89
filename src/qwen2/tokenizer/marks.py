"""Breaking control strings in texts that a Jinja template will paste together: marks go in before, and come off after.

Every place of a text where a control string stands, begins at its end, or could be completed from the middle, gets a character that
no input contains. No rendering that only pastes such texts has a control string from them. What a template that changes texts
needs beyond this is in `jinja.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

COMPARED = {"role", "type"}  # a template compares their values with words such as "tool", which `<tool_call>` contains


class Marker:
    """Marks for one rendering."""

    def __init__(self, control: Iterable[str], mark: str) -> None:
        self.mark = mark
        self._control = sorted(control)
        heads = "".join(sorted({re.escape(token[0]) for token in self._control}))
        self._heads = re.compile(f"[{heads}]") if heads else None

    def text(self, text: str, front: bool = True) -> str:
        """A string with marks, such that no control string survives in it, or arises where it meets what stands beside it.

        `front`: also where it could end or fill a control string that the template began.
        """
        if self._heads is None or not text:
            return text
        longest = max(map(len, self._control))
        cuts = [found.end() for found in self._heads.finditer(text) if self._touches(text[found.start() : found.start() + longest])]
        if front and any(text in token or _completes(text, token) for token in self._control):
            cuts.insert(0, 0)
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return self.mark.join(pieces)

    def _touches(self, rest: str) -> bool:
        """Whether a control string stands at the start of `rest`, or `rest` ends within one."""
        return any(rest.startswith(token) or token.startswith(rest) for token in self._control)

    def value(self, value: Any, key: str | None = None) -> Any:
        """Strings anywhere in JSON-like data. Keys are not marked in front: a template looks up `name`, which `<|repo_name|>` contains."""
        if isinstance(value, str):
            return self.text(value, front=key not in COMPARED)
        if isinstance(value, Mapping):
            return {self.text(k, front=False): self.value(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [self.value(item, key) for item in value]
        return value

    def drop(self, text: str) -> str:
        """The text without marks."""
        return text.replace(self.mark, "")


def _completes(text: str, token: str) -> bool:
    """Whether the text begins with the rest of a control string whose beginning a template could have written."""
    return any(text.startswith(token[i:]) for i in range(1, len(token)))


# Cuneiform, then ideographs of extension B: rare, and printable, for a template that prints a list or an object lets Python escape
# what is not, and an escaped mark could no longer be dropped. More than any prompt can use up.
MARKS = (range(0x12000, 0x12370), range(0x20000, 0x2A6D7))


def free_characters(*inputs: object) -> Iterator[str]:
    """Characters that none of the inputs contains, one after the other."""
    used: set[str] = set()
    for text in _strings(inputs):
        used.update(text)
    for code in chain(*MARKS):
        if chr(code) not in used:
            yield chr(code)
    raise ValueError("the conversation uses nearly every cuneiform sign and rare ideograph of Unicode; some must be free to render it")


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
