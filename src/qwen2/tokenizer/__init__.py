"""Text to ids and back, and conversations to ids: the only place where a chat becomes tokens."""

from __future__ import annotations

from qwen2.tokenizer.messages import NAME, Message, ToolCall, read_tools
from qwen2.tokenizer.parse import BETWEEN, DIALECTS, HERMES, Delta, Dialect, StreamParser, fold
from qwen2.tokenizer.parts import QWEN2_5_CONTROL, QWEN2_CONTROL, Parts
from qwen2.tokenizer.pieces import closed
from qwen2.tokenizer.plain import PlainCalls
from qwen2.tokenizer.sandbox import Limits
from qwen2.tokenizer.template import ChatTemplate, Rendered
from qwen2.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "BETWEEN",
    "DIALECTS",
    "HERMES",
    "NAME",
    "QWEN2_5_CONTROL",
    "QWEN2_CONTROL",
    "ChatTemplate",
    "Delta",
    "Dialect",
    "Limits",
    "Message",
    "Parts",
    "PlainCalls",
    "Rendered",
    "StreamDecoder",
    "StreamParser",
    "Tokenizer",
    "ToolCall",
    "closed",
    "fold",
    "read_tools",
]  # fmt: skip
