"""Block formats of quantized weights: the table, and tensors in and out of it. Torch is imported when a name of these is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2.quant.formats import FORMATS, Format
    from qwen2.quant.tensors import dequantize, dequantize_rows, format_id, format_of, quantize

__all__ = ["FORMATS", "Format", "dequantize", "dequantize_rows", "format_id", "format_of", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("qwen2.quant.formats" if name in ("FORMATS", "Format") else "qwen2.quant.tensors"), name)
