"""An adapter of llama.cpp, a GGUF file of pairs of matrices, made a folder as PEFT writes it, which is what the store keeps.

Its scale is adapter.lora.alpha by each pair's own rank, or 1 where alpha is 0. In files for Llama's architecture the rows of q and k lie
as in the model's own file. What is left out: splitting, pairs of embeddings and of routed experts, and rsLoRA, of which such a file says
nothing.

    to_folder(Path("adapter.gguf"), config, Path("adapter"))
"""

# I input width, O output width, r rank

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from qwen2.weights.adapter import CONFIG, PREFIX, WEIGHTS
from qwen2.weights.gguf import GGUFFile
from qwen2.weights.gguf_names import hf_name, unpermute

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from qwen2.config import ModelConfig

PAIR = re.compile(r"(?P<name>[\w.]+\.weight)\.lora_(?P<part>[ab])", re.ASCII)
NARROW = {1: torch.float16, 30: torch.bfloat16}  # types that are kept; others become float32


def to_folder(path: Path, config: ModelConfig, folder: Path) -> None:
    """Write the two files of the adapter of a model of this shape. Raises ValueError in one line that says what is wrong and where."""
    with GGUFFile.open(path) as file:
        kind, form = file.metadata.get("general.type"), file.metadata.get("adapter.type")
        if (kind, form) != ("adapter", "lora"):
            raise ValueError(f"{path}: not a LoRA adapter but a {form or kind or 'model'}; ADAPTER needs one, models stand in FROM")
        alpha = file.metadata.get("adapter.lora.alpha")
        if not isinstance(alpha, float) or not 0 <= alpha < float("inf"):
            raise ValueError(f"{path}: adapter.lora.alpha {alpha!r}: must be a number of at least 0")
        tensors = {name: tensor for one in file.tensors for name, tensor in [_read(file, one, config)]}
    ranks = {name.removesuffix(".lora_A.weight"): len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    if not ranks:
        raise ValueError(f"{path}: has no tensors of an adapter")
    rank = next(iter(ranks.values()))
    values: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "fan_in_fan_out": False}
    values |= {"r": rank, "lora_alpha": alpha if alpha else rank, "target_modules": sorted(ranks)}
    values["rank_pattern"] = {name: own for name, own in ranks.items() if own != rank}
    values["alpha_pattern"] = {} if alpha else {name: own for name, own in ranks.items() if own != rank}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def _read(file: GGUFFile, name: str, config: ModelConfig) -> tuple[str, Tensor]:
    """A tensor as PEFT has it: A (r, I) or B (O, r)."""
    pair = PAIR.fullmatch(name)
    if pair is None:
        raise ValueError(f"{file.path}: {name}: not one of a pair lora_a and lora_b beside a matrix; it would change the result")
    try:
        layer = hf_name(pair["name"], config).removesuffix(".weight")
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}; the adapter was made for another model") from None
    info = file.info(name)
    if len(info.shape) != 2:
        raise ValueError(f"{file.path}: {name} has shape {list(info.shape)}: not what a linear layer's adapter has")
    tensor = file.tensor(name, dtype=NARROW.get(info.type, torch.float32))
    if pair["part"] == "b" and file.metadata.get("general.architecture") == "llama" and layer.endswith(("q_proj", "k_proj")):
        tensor = unpermute(tensor, config.heads if layer.endswith("q_proj") else config.kv_heads).contiguous()
    return f"{layer}.lora_{pair['part'].upper()}.weight", tensor
