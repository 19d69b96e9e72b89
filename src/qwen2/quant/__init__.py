"""Block formats of quantized weights: the table, and tensors in and out of it."""

from qwen2.quant.formats import FORMATS, Format
from qwen2.quant.tensors import dequantize, dequantize_rows, format_id, format_of, quantize

__all__ = ["FORMATS", "Format", "dequantize", "dequantize_rows", "format_id", "format_of", "quantize"]
