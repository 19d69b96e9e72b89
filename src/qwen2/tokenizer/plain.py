"""Calls that a model writes as plain JSON, without the brackets of its format: an answer that is nothing but one.

Qwen2.5-Coder of 0.5B and 1.5B, given tools, write a fence of ```json with {"name": ..., "arguments": {...}} in it, or the object
bare, and hardly ever <tool_call>. Such an answer is a call where it is whole, names a tool that was given, and has these two members
and no other; a list of such objects is several. Anything else is text, and is let go as soon as it can be nothing else.
Left out: calls with words around them, since JSON in the midst of a text may be an example.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qwen2.tokenizer.messages import NAME, STRICT_JSON, ToolCall, check_object, members, skip_space
from qwen2.tokenizer.pieces import Nesting

FENCE = "```"
FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
BEGINS = ("```json", FENCE, "")


@dataclass
class PlainCalls:
    """The answer so far. `names`: of the tools that may be called so; `one`: at most one call.

    `fits`: whether a name and arguments (JSON) are a call that may be made, where more is asked of it than that they are an object.
    """

    names: Sequence[str]
    one: bool = False
    fits: Callable[[str, str], bool] | None = None
    _text: str = ""
    _may_be: bool = True
    _at: int = 0  # how far brackets were counted
    _nesting: Nesting = field(default_factory=Nesting)
    _openings: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        keys = [*(f'{{"name":"{name}"' for name in self.names), '{"arguments":{']
        lists = ("",) if self.one else ("", "[")
        self._openings = tuple(begin + bracket + key for begin in BEGINS for bracket in lists for key in keys)

    def push(self, text: str) -> str:
        """More of the answer; what of it is text for certain."""
        if not self._may_be:
            return text
        self._text += text
        self._may_be = self._opens() and self._goes_on()
        return "" if self._may_be else self._text

    def end(self) -> tuple[list[ToolCall], str]:
        """The answer is over: its calls, or the text that was held back."""
        if not self._may_be:
            return [], ""
        calls = self._read()
        return calls, "" if calls else self._text

    def _opens(self) -> bool:
        """Whether it begins as a call may. Blanks do not count here; where they may not be, reading it will say."""
        head = "".join(self._text[:1024].split())
        return any(opening.startswith(head) or head.startswith(opening) for opening in self._openings)

    def _goes_on(self) -> bool:
        """Whether nothing follows its end but the fence's."""
        for char in self._text[self._at :]:
            self._nesting.take(char)
            self._at += 1
            if char in "}]" and self._nesting.depth <= 0 and not self._nesting.in_string:
                break
        else:
            return True
        end = self._at
        self._at -= 1  # the last bracket is seen again with more behind it
        self._nesting.depth += 1
        rest = self._text[end:].strip()
        return FENCE.startswith(rest) if self._text.lstrip().startswith(FENCE) else not rest

    def _read(self) -> list[ToolCall]:
        text = self._text.strip()
        if text.startswith(FENCE):
            found = FENCED.fullmatch(text)
            if found is None:
                return []
            text = found[1]
        try:
            return [self._call(part) for part in self._parts(text)]
        except (ValueError, RecursionError):
            return []

    def _parts(self, text: str) -> list[str]:
        """The text of the object, or of each in a list. ValueError where it is neither."""
        if not text.startswith("["):
            return [text]
        value, end = STRICT_JSON.raw_decode(text, 0)
        if self.one or end != len(text):
            raise ValueError("not a list by itself, or not one call")
        parts, at = [], 1
        for _ in value:
            start = skip_space(text, at)
            _, at = STRICT_JSON.raw_decode(text, start)
            parts.append(text[start:at])
            at = skip_space(text, at) + 1  # over the comma
        return parts

    def _call(self, text: str) -> ToolCall:
        found = members(text)
        if found.keys() != {"name", "arguments"}:
            raise ValueError("not the two members of a call")
        name, arguments = found["name"][0], found["arguments"][1]
        if not isinstance(name, str) or name not in self.names or NAME.fullmatch(name) is None:
            raise ValueError("not the name of a tool that was given")
        check_object(arguments, "arguments")
        if self.fits is not None and not self.fits(name, arguments):
            raise ValueError("not arguments of its schema")
        return ToolCall(name, arguments)
