"""Text to ids and back, and conversations to ids: the only place where a chat becomes tokens."""

from __future__ import annotations

from .messages import Message, ToolCall
from .parse import Delta, StreamParser, fold
from .parts import QWEN2_5_CONTROL, QWEN2_CONTROL, Parts
from .sandbox import Limits
from .template import ChatTemplate, Rendered
from .tokenizer import StreamDecoder, Tokenizer

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
