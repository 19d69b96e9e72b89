"""What a row of post-training data is, whatever its file looked like: a conversation, a preference, a text, or a reason to leave it out.

Messages are OpenAI's dictionaries as `tokenizer/messages.py` checks them. `where` is "file:line" (of JSON arrays, Parquet and Arrow
"file:row"), from 1. What is left out: which keys of which tool's files become what (formats.py), and files (readers.py).

    Example([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], None, "sums.jsonl:1")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """A conversation with at least one answer. `label`: whether it is wanted (KTO), None where nobody said.

    `untrained`: indices of assistant messages that a file excludes from the loss ("weight": 0 of OpenAI's, "loss": false of others).
    """

    messages: Messages
    tools: Tools | None
    where: str
    label: bool | None = None
    untrained: tuple[int, ...] = ()


@dataclass(frozen=True)
class Preference:
    """A prompt and two ways to go on, `chosen` the better one: each begins with an assistant's message."""

    messages: Messages
    chosen: Messages
    rejected: Messages
    tools: Tools | None
    where: str

    def example(self) -> Example:
        """What is learned from it by imitation: the conversation with the chosen answer."""
        turns = [*self.messages, *self.chosen]
        past = tuple(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        return Example(turns, self.tools, self.where, untrained=past)


@dataclass(frozen=True)
class PlainText:
    """A document without turns."""

    text: str
    where: str


@dataclass(frozen=True)
class Skipped:
    """A row that is not used: `why` is the kind of reason, in words that such rows share; `detail` tells more of this one."""

    why: str
    where: str
    detail: str = ""


Record = Example | Preference | PlainText | Skipped
