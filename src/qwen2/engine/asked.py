"""What was asked of a model, on its way: the engine's request, and for a chat with tools what tells content and calls apart.

Whoever takes the request's chunks, a program's loop or a server, passes each through `read` once, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen2.tokenizer import Delta, fold

if TYPE_CHECKING:
    from qwen2.engine.request import Chunk, Request
    from qwen2.tokenizer import StreamParser


class Asked:
    """A request, and a parser for each of its samples where tools were offered.

    `only_calls`: what else is read is the beginning of a call that was cut off before its name, and is left out.
    """

    def __init__(self, request: Request, parsers: Sequence[StreamParser] = (), only_calls: bool = False) -> None:
        self.request, self.parsers, self.only_calls = request, parsers, only_calls
        self._deltas: list[list[Delta]] = [[] for _ in parsers]

    def read(self, chunk: Chunk) -> Chunk:
        """The chunk with content and calls in its `deltas`; an answer that calls and then stops has finished with "tool_calls"."""
        if not self.parsers:
            return chunk
        parser, deltas = self.parsers[chunk.index], self._deltas[chunk.index]
        new = parser.push(chunk.text) + (parser.flush() if chunk.output is not None else [])
        if self.only_calls:
            new = [delta for delta in new if not delta.content]
        deltas += new
        if chunk.output is not None:
            message = fold(deltas)
            called = any(not call.cut for call in message.tool_calls)
            reason = "tool_calls" if called and chunk.finish_reason == "stop" else chunk.output.finish_reason
            output = replace(chunk.output, finish_reason=reason, content=message.content, tool_calls=tuple(message.tool_calls))
            chunk = replace(chunk, finish_reason=reason, output=output)
        return replace(chunk, deltas=tuple(new))
