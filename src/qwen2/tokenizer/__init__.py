"""Text to ids and back, and conversations to ids: the only place where a chat becomes tokens."""

from __future__ import annotations

from .parts import QWEN2_5_CONTROL, QWEN2_CONTROL, Parts
from .tokenizer import StreamDecoder, Tokenizer

__all__ = ["QWEN2_5_CONTROL", "QWEN2_CONTROL", "Parts", "StreamDecoder", "Tokenizer"]
