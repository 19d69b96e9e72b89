"""Text to ids and back, and conversations to ids: the only place where a chat becomes tokens."""

from __future__ import annotations

from qwen2.tokenizer.messages import Message, ToolCall
from qwen2.tokenizer.parse import Delta, StreamParser, fold
from qwen2.tokenizer.parts import QWEN2_5_CONTROL, QWEN2_CONTROL, Parts
from qwen2.tokenizer.sandbox import Limits
from qwen2.tokenizer.template import ChatTemplate, Rendered
from qwen2.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "QWEN2_5_CONTROL",
    "QWEN2_CONTROL",
    "ChatTemplate",
    "Delta",
    "Limits",
    "Message",
    "Parts",
    "Rendered",
    "StreamDecoder",
    "StreamParser",
    "Tokenizer",
    "ToolCall",
    "fold",
]  # fmt: skip
