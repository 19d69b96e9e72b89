"""How large the blocks of every ggml type are: enough to check a file's extents, also for the types we do not unpack.

What is left out: what the bytes mean, which is in `formats.py`. Nothing here imports torch, so that `qwen2 show x.gguf`
answers at once. Numbers: ggml's type table, held against the gguf package's in the tests.
"""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """A block of `block` weights takes `bytes` bytes."""

    name: str
    block: int
    bytes: int


LAYOUTS: dict[int, Layout] = {  # ggml id: name, weights per block, bytes per block
    0: Layout("F32", 1, 4),
    1: Layout("F16", 1, 2),
    2: Layout("Q4_0", 32, 18),
    3: Layout("Q4_1", 32, 20),
    6: Layout("Q5_0", 32, 22),
    7: Layout("Q5_1", 32, 24),
    8: Layout("Q8_0", 32, 34),
    9: Layout("Q8_1", 32, 40),
    10: Layout("Q2_K", 256, 84),
    11: Layout("Q3_K", 256, 110),
    12: Layout("Q4_K", 256, 144),
    13: Layout("Q5_K", 256, 176),
    14: Layout("Q6_K", 256, 210),
    15: Layout("Q8_K", 256, 292),
    16: Layout("IQ2_XXS", 256, 66),
    17: Layout("IQ2_XS", 256, 74),
    18: Layout("IQ3_XXS", 256, 98),
    19: Layout("IQ1_S", 256, 50),
    20: Layout("IQ4_NL", 32, 18),
    21: Layout("IQ3_S", 256, 110),
    22: Layout("IQ2_S", 256, 82),
    23: Layout("IQ4_XS", 256, 136),
    24: Layout("I8", 1, 1),
    25: Layout("I16", 1, 2),
    26: Layout("I32", 1, 4),
    27: Layout("I64", 1, 8),
    28: Layout("F64", 1, 8),
    29: Layout("IQ1_M", 256, 56),
    30: Layout("BF16", 1, 2),
    34: Layout("TQ1_0", 256, 54),
    35: Layout("TQ2_0", 256, 66),
    39: Layout("MXFP4", 32, 17),
    40: Layout("NVFP4", 64, 36),
    41: Layout("Q1_0", 128, 18),
}
