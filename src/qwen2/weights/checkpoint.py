"""Safetensors checkpoints in Hugging Face's layout: which file holds a tensor, and the single rule that stacks experts.

A checkpoint names each expert's three matrices; the decoder holds them stacked, gate over up as (E, 2F, D) and down as
(E, D, F). `expert_parts` is the only place that knows both. Tensors whose stored type is the wanted one stay memory-mapped and
are never copied; others are converted one at a time, so that no more than one tensor exists twice.

What is left out: GGUF files (gguf_source.py) and everything that is not safetensors; pickled weights are not read at all.
"""

# E experts, F expert feed-forward size, D hidden

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from qwen2.weights.pack import Rows
from qwen2.weights.safetensors_header import read_safetensors_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from torch import Tensor

    from qwen2.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STACKED = re.compile(r"(?P<prefix>model\.layers\.\d+\.mlp\.experts)\.(?P<part>gate_up_proj|down_proj)")
FLOATS = ("F32", "F16", "BF16")
GGML_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def expert_parts(name: str, experts: int) -> list[list[str]] | None:
    """The checkpoint's names of a stacked parameter: for each expert, the matrices laid one under the other; None for others."""
    match = STACKED.fullmatch(name)
    if match is None:
        return None
    return [[f"{match['prefix']}.{expert}.{part}.weight" for part in PARTS[match["part"]]] for expert in range(experts)]


def split_experts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's (name, tensor) pairs of one parameter of the decoder: itself, or its experts' matrices."""
    names = expert_parts(name, len(tensor))
    if names is None:
        yield name, tensor
        return
    for matrices, expert in zip(names, tensor, strict=True):
        yield from zip(matrices, expert.chunk(len(matrices)), strict=True)


class SafetensorsSource:
    """The tensors of a Hugging Face folder, by the decoder's parameter names; `llama` says that q, k and v may lack biases.

    Raises ValueError naming the file where the index or a header is broken, a tensor's type is none that weights have, or the
    config asks for more layers or experts than there are; FileNotFoundError where a file is missing.
    """

    def __init__(self, folder: Path, config: ModelConfig, llama: bool = False) -> None:
        self.folder, self.config, self.may_lack_biases = folder, config, llama
        self.files = _files_by_tensor(folder)
        self.unread = set(self.files)
        self._check_count("num_hidden_layers", config.layers, r"model\.layers\.(\d+)\..*")  # before a network of that size is built
        if config.moe is not None:
            self._check_count("num_experts", config.moe.experts, r"model\.layers\.\d+\.mlp\.experts\.(\d+)\..*")

    def _check_count(self, key: str, asked: int, pattern: str) -> None:
        there = {match[1] for name in self.files if (match := re.fullmatch(pattern, name))}
        if len(there) < asked:
            raise ValueError(f"{self.folder}: config.json: {key} is {asked}, the checkpoint holds {len(there)}")

    def dtype(self) -> torch.dtype:
        """The type that the matrices are stored in."""
        name = next((name for name in sorted(self.files) if name.endswith("_proj.weight")), next(iter(self.files)))
        with safe_open(self.files[name], framework="pt") as file:
            dtype: torch.dtype = file.get_slice(name)[:0].dtype
            return dtype

    def has(self, name: str) -> bool:
        parts = expert_parts(name, self.config.moe.experts) if self.config.moe else None
        return name in self.files or (parts is not None and parts[0][0] in self.files)

    def in_blocks(self, name: str) -> bool:
        """Nothing is in blocks here."""
        return False

    def load(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The parameter `name` as (shape) of `dtype` on `device`."""
        parts = expert_parts(name, shape[0])
        if parts is None:
            return self._one(name, shape).to(device, dtype)
        stacked = torch.empty(shape, dtype=dtype, device=device)
        for expert, matrices in zip(stacked, parts, strict=True):
            for place, part in zip(expert.chunk(len(matrices)), matrices, strict=True):
                place.copy_(self._one(part, place.shape))
        return stacked

    def rows(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> list[Rows]:
        """The matrices behind a parameter in their stored type or in `dtype`; of experts each expert's, gate before up."""
        parts = expert_parts(name, shape[0]) if len(shape) == 3 else None
        if parts is None:
            return [self._rows(name, shape, dtype)]
        part_shape = torch.Size((shape[1] // len(parts[0]), shape[2]))
        return [self._rows(part, part_shape, dtype) for matrices in parts for part in matrices]

    def _rows(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> Rows:
        tensor = self._one(name, shape)
        wanted = tensor.dtype if dtype is None else dtype

        def read(first: int, count: int) -> np.ndarray:
            piece = tensor[first : first + count].to(wanted).contiguous()
            array: np.ndarray = piece.view(torch.uint8).reshape(-1).numpy()
            return array

        return Rows(GGML_TYPES[wanted], shape[0], shape[1], read)

    def packed(self, name: str, dtype: torch.dtype) -> None:
        """Nothing is in blocks here."""

    def _one(self, name: str, shape: torch.Size) -> Tensor:
        path = self.files.get(name)
        if path is None:
            raise ValueError(f"{self.folder}: tensor {name} is missing; the checkpoint is incomplete or its config.json is another model's")
        try:
            with safe_open(path, framework="pt") as file:  # opened anew each time: closing gives the mapped pages back
                tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
        self.unread.discard(name)
        if tensor.shape != shape:
            raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, the config asks for {list(shape)}")
        return tensor

    def check_rest(self) -> None:
        """Refuse tensors that no parameter asked for, but those known not to matter."""
        rest = {name for name in self.unread if not name.endswith("rotary_emb.inv_freq")}
        if "lm_head.weight" in rest and self.config.tied:
            rest.discard("lm_head.weight")
            shape = torch.Size((self.config.vocab, self.config.hidden))
            if not torch.equal(self._one("lm_head.weight", shape), self._one("model.embed_tokens.weight", shape)):
                raise ValueError(
                    f"{self.folder}: config.json ties the output head to the embedding, but lm_head.weight differs from it; "
                    'set "tie_word_embeddings" to false to load it'
                )
        if rest:
            raise ValueError(f"{self.folder}: {len(rest)} tensors that this architecture does not have: {', '.join(sorted(rest)[:3])}")


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if not index.exists():
        path = folder / SINGLE
        if not path.exists():
            raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        return _floats(path)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: not an index of safetensors shards: {error}") from None
    files: dict[str, Path] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: {shard!r} is not the name of a file beside it")
        path = folder / shard
        if not path.exists():
            raise FileNotFoundError(f"{path}: named by {INDEX}, but not there; download it again")
        files |= _floats(path)
    missing = sorted(set(weight_map) - set(files))
    if missing:
        raise ValueError(f"{index}: {len(missing)} tensors are in no shard, the first is {missing[0]}")
    return files


def _floats(path: Path) -> dict[str, Path]:
    """The tensors of one file, which must all be of a type that weights have: casting others would change the answer."""
    header = read_safetensors_header(path)
    for name, extent in header.items():
        if extent.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is of type {extent.dtype}, not one of {', '.join(FLOATS)}: quantized weights come as GGUF")
    return dict.fromkeys(header, path)
