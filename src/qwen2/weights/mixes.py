"""Which type each tensor of a GGUF file gets: the mixes people know by name, from Q2_K to Q8_0, and why.

The mixes are llama.cpp's (`llama-quantize`, without an importance matrix), so that a file made here is of the size and of the
quality that its name promises. What is left out: the blocks themselves (quant/), and choosing types by measured importance.

    choose("blk.0.attn_v.weight", (256, 1536), config, "Q4_K_M")
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen2.quant.layout import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2.config import ModelConfig
    from qwen2.weights.gguf import GGUFFile

FILE_TYPES = {  # general.file_type, llama.cpp's numbers
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 25: "IQ4_NL", 32: "BF16",
}  # fmt: skip
MIXES = {name: number for number, name in FILE_TYPES.items()}
TYPES = {layout.name: (number, layout.block) for number, layout in LAYOUTS.items()}
PLAIN = ("F32", "F16", "BF16")
NARROWER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where rows are not whole blocks of 256
MATRIX = re.compile(r"blk\.(\d+)\.(attn_[vqk]|attn_output|ffn_(?:down|gate|up))(?:_exps|_shexp)?\.weight")


def mix_of(file: GGUFFile) -> str:
    """A file's mix of types as people name it: what the file says of it, else the type with most of the matrices' bytes."""
    weights: Counter[str] = Counter()
    for info in file.tensors.values():
        if len(info.shape) > 1:
            weights[info.type_name] += info.nbytes
    return FILE_TYPES.get(file.metadata.get("general.file_type"), weights.most_common(1)[0][0])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Choice:
    """The type of one tensor; `instead_of` is what the mix asks for where the rows cannot be cut into its blocks."""

    type: str
    reason: str
    instead_of: str | None = None

    @property
    def number(self) -> int:
        return TYPES[self.type][0]


def mix_named(name: str) -> str:
    """The mix by its name in any case. Raises ValueError naming those there are."""
    if name.upper() not in MIXES:
        raise ValueError(f"GGUF format {name!r} cannot be written; choose one of {', '.join(MIXES)}")
    return name.upper()


def choose(name: str, shape: Sequence[int], config: ModelConfig, mix: str) -> Choice:
    """The type of the GGUF tensor `name` (rows first) in a file of this mix."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return Choice("F32", "vectors and the router stay exact")
    wanted, reason = _wanted(name, shape[-1], config, mix)
    held = wanted
    while shape[-1] % TYPES[held][1]:
        held = NARROWER.get(held, "F32")
    if held == wanted:
        return Choice(wanted, reason)
    return Choice(held, f"rows of {shape[-1]} weights are not whole {wanted} blocks of {TYPES[wanted][1]}", wanted)


def _wanted(name: str, columns: int, config: ModelConfig, mix: str) -> tuple[str, str]:
    """What the mix asks for, whether or not the rows can be cut into its blocks."""
    base = re.sub(r"(_K)_[SML]$", r"\1", mix)
    if mix in (*PLAIN, "Q8_0"):
        return base, "as asked"
    if name == "output.weight" or (name == "token_embd.weight" and config.tied):
        return ("Q6_K" if columns % 256 == 0 else "Q8_0"), "the head decides every token"
    matrix = MATRIX.fullmatch(name)
    if matrix is None or matrix[2] not in ("attn_v", "attn_output", "ffn_down"):
        return base, "as asked"
    more = _more(mix, matrix[2], int(matrix[1]), config) or base
    if matrix[2] == "attn_v" and config.layers == 80 and more in ("Q3_K", "Q4_K"):  # a 72B model's value projections are small
        return "Q5_K", "attn_v is small where 8 heads share it"
    if more != base:
        return more, f"{matrix[2]} is sensitive" + (" in these layers" if mix[-1] in "SML" else "")
    return base, "as asked"


def _more(mix: str, part: str, layer: int, config: ModelConfig) -> str | None:
    """What a mix gives to the sensitive matrices of a layer, None for nothing special."""
    layers = config.layers
    often = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    shared = config.heads // config.kv_heads >= 4
    rules: dict[str, dict[str, str | None]] = {
        "Q2_K": {"attn_v": "Q4_K" if shared else "Q3_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"},
        "Q3_K_M": {
            "attn_v": "Q5_K" if layer < 2 else "Q4_K",
            "attn_output": "Q4_K",
            "ffn_down": "Q5_K" if layer < layers // 16 else "Q4_K",
        },
        "Q3_K_L": {"attn_v": "Q5_K", "attn_output": "Q5_K", "ffn_down": "Q5_K"},
        "IQ4_NL": {"attn_v": "Q5_K" if shared else None, "ffn_down": "Q5_K" if layer < layers // 8 else None},
        "Q4_K_S": {"attn_v": "Q5_K" if layer < 4 else None, "ffn_down": "Q5_K" if layer < layers // 8 else None},
        "Q4_K_M": {"attn_v": "Q6_K" if often else None, "ffn_down": "Q6_K" if often else None},
    }
    rules["Q5_K_M"] = rules["Q4_K_M"]
    return rules.get(mix, {}).get(part)
