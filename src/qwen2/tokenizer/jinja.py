"""One conversation under a checkpoint's own Jinja template: ids, text and mask, and no control token that the template did not write.

A rendering is one string in which the template's control tokens and people's text are no longer told apart. So the control strings
in the template's source are rendered as signs, one character each that occurs nowhere else: where a sign comes out, the template
wrote the token, whatever it does with texts (lower, replace, split, reverse). Control strings in texts are broken by marks
(`marks.py`). What is left are control strings that come out all the same: of a template that builds them (`'<|' + role + '|>'`), or
of one that changes texts. They count only if the same ones come out when every text is replaced by harmless characters.

What this cannot do: a template that compares a message's text with a control string (`'</think>' in message.content`) does not
find it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwen2.tokenizer.marks import COMPARED, Marker, free_characters
from qwen2.tokenizer.messages import ROLES
from qwen2.tokenizer.sandbox import JinjaSandbox
from qwen2.tokenizer.tokenizer import Tokenizer, control_pattern

# Control strings that cannot be a piece of Jinja's syntax: three characters or more, one of them no letter, none a bracket or quote
SIGNABLE = re.compile(r"(?=.*\W)[^\s{}%#'\"\\]{3,}")


@dataclass(frozen=True)
class Conversation:
    """Messages with marks, for a source with signs. `signs`: sign -> control string."""

    tokenizer: Tokenizer
    sandbox: JinjaSandbox
    source: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    marker: Marker
    signs: dict[str, str]
    harmless: str  # a character that occurs nowhere

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, sandbox: JinjaSandbox, source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> Conversation:
        """Choose the characters, mark the texts, sign the source."""
        free = free_characters(messages, tools, source)
        marker, harmless = Marker(tokenizer.control, next(free)), next(free)
        pattern = control_pattern(filter(SIGNABLE.fullmatch, tokenizer.control))
        written = [*(pattern.findall(source) if pattern else []), *_named(tokenizer).values()]
        sign_of = {token: next(free) for token in dict.fromkeys(written)}
        signed = pattern.sub(lambda found: sign_of[found[0]], source) if pattern else source
        signs = {sign: token for token, sign in sign_of.items()}
        return cls(tokenizer, sandbox, signed, marker.value(messages), marker.value(tools) or None, marker, signs, harmless)

    def text(self, count: int, prompt: bool) -> str:
        """The first `count` messages, with marks and signs."""
        sign_of = {token: sign for sign, token in self.signs.items()}
        named = {name: sign_of[token] for name, token in _named(self.tokenizer).items()}
        context = {"messages": self.messages[:count], "tools": self.tools, "documents": None, "add_generation_prompt": prompt}
        return self.sandbox.render(self.source, context | named)

    def pieces(self, prompt: bool) -> tuple[str, list[tuple[str, int | None]]]:
        """The rendering, and what it consists of: control tokens with their ids, and text."""
        whole = self.text(len(self.messages), prompt)
        builds = self._builds_control(whole, prompt)
        pieces: list[tuple[str, int | None]] = []
        for run in self._runs(whole):
            if run[0] in self.signs or builds:
                parts = self.tokenizer.split_control("".join(self.signs.get(char, char) for char in run))
                pieces += [(self.marker.drop(part), self.tokenizer.control.get(part)) for part in parts]
            else:
                pieces.append((self.marker.drop(run), None))
        return whole, pieces

    def shown(self, text: str) -> str:
        """A rendering without marks and signs."""
        return "".join(self.signs.get(char, char) for char in self.marker.drop(text))

    def _runs(self, text: str) -> Iterator[str]:
        """Signs in a row, and what stands between them."""
        pieces = re.split(f"([{''.join(self.signs)}]+)", text) if self.signs else [text]
        return (piece for piece in pieces if piece)

    # --- control strings that are not spelled out in the source

    def _unsigned(self, text: str) -> list[str]:
        pieces = (piece for run in self._runs(text) for piece in self.tokenizer.split_control(run))
        return [piece for piece in pieces if piece in self.tokenizer.control]

    def _builds_control(self, whole: str, prompt: bool) -> bool:
        """Whether control strings without a sign are the template's. ValueError if some are and some come from a text."""
        found = self._unsigned(whole)
        expected = self._neutral(len(self.messages))._unsigned_alone(prompt) if found else []
        if expected and found != expected:
            raise ValueError(
                f"the model's chat template makes control tokens such as {found[0]!r} out of text, "
                f"here out of {self._culprit(found, prompt)}; use the style 'qwen2' or 'qwen2.5'"
            )
        return bool(expected)

    def _unsigned_alone(self, prompt: bool) -> list[str]:
        return self._unsigned(self.text(len(self.messages), prompt))

    def _culprit(self, found: list[str], prompt: bool) -> str:
        """The message whose text matters, by bisection: with texts up to `low` made harmless nothing changes, up to `high` it does."""
        low, high = 0, len(self.messages)
        if replace(self._neutral(high), tools=self.tools)._unsigned_alone(prompt) == found:
            return "tools"
        while high - low > 1:
            middle = (low + high) // 2
            same = replace(self._neutral(middle), tools=self.tools)._unsigned_alone(prompt) == found
            low, high = (middle, high) if same else (low, middle)
        return f"messages[{low}]"

    def _neutral(self, count: int) -> Conversation:
        """The same conversation with nothing in the texts of its tools and first messages that could become a control string."""
        first = [self._harmless(message) | {"role": message["role"]} for message in self.messages[:count]]
        return replace(self, messages=[*first, *self.messages[count:]], tools=self._harmless(self.tools))

    def _harmless(self, value: Any, key: str | None = None) -> Any:
        if isinstance(value, str):
            return value if key in COMPARED and self._looked_up(value) else self.harmless * len(value)
        if isinstance(value, Mapping):
            names = [name if self._looked_up(name) else self.harmless * (i + 1) for i, name in enumerate(value)]
            return {name: self._harmless(item, name) for name, item in zip(names, value.values(), strict=True)}
        if isinstance(value, list):
            return [self._harmless(item, key) for item in value]
        return value

    def _looked_up(self, word: str) -> bool:
        """Whether the template may look for this key or compare with this value."""
        return word in self.source or word in ROLES or word == "function"

    # --- what was sampled

    def mask(self, whole: str, pieces: list[tuple[str, int | None]]) -> list[bool]:
        """True on tokens that begin inside a sampled stretch of the text."""
        inside = bytearray(len(self.shown(whole)) + 1)  # a flag per character
        for i, message in enumerate(self.messages):
            if message["role"] == "assistant":
                start, end = (len(self.shown(whole[:at])) for at in self._sampled(whole, i))
                inside[start:end] = b"\1" * (end - start)
        mask, at = [], 0
        for text, id in pieces:
            starts = self.tokenizer.encode_with_starts(text)[1] if id is None else [0]
            mask += [bool(inside[at + start]) for start in starts]
            at += len(text)
        return mask

    def _sampled(self, whole: str, i: int) -> tuple[int, int]:
        """Where message i lies: from the end of its prompt to the last token that ends a text, or to its own end without one."""
        before, after = self.text(i, prompt=True) if i else self._opening(), self.text(i + 1, prompt=False)
        ends = [self.tokenizer.decode([id]) for id in self.tokenizer.eos]
        ends += [sign for sign, token in self.signs.items() if token in ends]
        last = max(after.rfind(token) + len(token) if token in after else -1 for token in ["", *ends] if token or not ends)
        end = last if last > len(before) else len(after)
        if not after.startswith(before) or not whole.startswith(after[:end]):
            raise ValueError(
                f"the model's chat template writes messages[{i}] differently in the whole conversation and alone, so that its sampled "
                "tokens cannot be told; use the style 'qwen2' or 'qwen2.5' for training"
            )
        return len(before), end

    def _opening(self) -> str:
        """The prompt of a conversation that an assistant opens. Templates need a message, so the prompt is told from another's."""
        other = replace(self, messages=[{"role": "user", "content": "x"}])
        header = other.text(1, prompt=True).removeprefix(other.text(1, prompt=False))
        before, found, _ = self.text(1, prompt=False).partition(header)
        if not header or not found:
            raise ValueError("an assistant's turn opens the conversation, and the template does not show where")
        return before + header


def _named(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens that templates know by a name."""
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos[0] if tokenizer.eos else None, "pad_token": tokenizer.pad}
    return {name: tokenizer.decode([id]) for name, id in ids.items() if id is not None}
