"""Write a loaded model out: a Hugging Face folder that transformers loads, or a GGUF file that llama.cpp loads.

Both appear whole or not at all: everything is written beside the destination and renamed at the end.
What is left out: files made without loading a model as a whole (quantize.py), and calibration.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from qwen2.weights.checkpoint import INDEX, SINGLE, split_experts
from qwen2.weights.gguf_sampling import sampling_to_gguf
from qwen2.weights.gguf_write import gguf_tensors, write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from qwen2.config import GenerationDefaults, ModelConfig
    from qwen2.tokenizer import Tokenizer
    from qwen2.weights.model import Model

SHARD_BYTES = 2_000_000_000


def to_hf_folder(model: Model, folder: Path, shard_bytes: int = SHARD_BYTES, dtype: torch.dtype | None = None) -> None:
    """Write config.json, generation_config.json, the tokenizer's files and safetensors of at most `shard_bytes` each.

    `dtype` None keeps the type that the model computes in. Raises FileExistsError where `folder` exists, ValueError for a weight
    that `dtype` cannot hold, OSError where the disk has no room.
    """
    dtype = model.dtype if dtype is None else dtype
    check_place(folder, "folder")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    draft.mkdir()
    try:
        config = replace(model.config, dtype=str(dtype).removeprefix("torch."))
        _write_json(draft / "config.json", config.to_hf())
        _write_json(draft / "generation_config.json", model.generation.to_hf())
        model.tokenizer.save(draft)
        _write_shards(model, draft, shard_bytes, dtype)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_shards(model: Model, folder: Path, shard_bytes: int, dtype: torch.dtype) -> None:
    shards = list(_shards(model, shard_bytes, dtype))
    total = sum(tensor.numel() * dtype.itemsize for shard in shards for tensor in shard.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(errno.ENOSPC, f"{folder}: the weights need {total} bytes and the disk has {free} free; make room or write elsewhere")
    if len(shards) == 1:
        _save(shards[0], folder / SINGLE, dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / file, dtype)
        weight_map |= dict.fromkeys(shard, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(model: Model, shard_bytes: int, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's tensors in order, as views, cut where the next one would pass the limit."""
    shard: dict[str, Tensor] = {}
    size = 0
    for parameter_name, parameter in model.network.tensors():
        for name, tensor in split_experts(parameter_name, parameter.detach()):
            nbytes = tensor.numel() * dtype.itemsize
            if shard and size + nbytes > shard_bytes:
                yield shard
                shard, size = {}, 0
            shard[name] = tensor
            size += nbytes
    yield shard


def _save(shard: dict[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    # Experts are views of one storage, which the library refuses; a copy of those alone is made, a shard at a time.
    own = {name: tensor.to("cpu", dtype, copy=tensor._is_view()) for name, tensor in shard.items()}
    for name, tensor in own.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: has weights that are not finite in {str(dtype).removeprefix('torch.')}; choose a wider type")
    save_file(own, path, metadata={"format": "pt"})
    shutil.copymode(path.with_name("config.json"), path)  # the library writes files that only their owner can read


def check_place(path: Path, kind: str) -> None:
    if path.exists():
        raise FileExistsError(f"{path}: exists already; name a new {kind}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent} to write it into")


def to_gguf(model: Model, path: Path, form: str = "Q8_0") -> list[str]:
    """Write a GGUF file, its matrices in `form` (a mix of mixes.py); norms, biases and the router stay F32.

    Returns a line for each kind of matrix that the form cannot hold, with what it was written as, and for what llama.cpp computes
    otherwise. Raises FileExistsError where `path` exists, ValueError for another form.
    """
    check_place(path, "file")
    check_layers(model.config)
    tensors, notes = gguf_tensors(model.config, dict(model.network.tensors()), form)
    metadata = gguf_metadata(model.config, model.tokenizer, model.generation, model.name)
    write_gguf(path, metadata, tensors, form)
    return notes + gguf_caveats(model.config)


def check_layers(config: ModelConfig) -> None:
    """Refuse a model that GGUF has no form for."""
    moe_layers = sum(map(config.is_moe, range(config.layers)))
    if moe_layers not in (0, config.layers):
        raise ValueError(f"{moe_layers} of {config.layers} layers have experts: GGUF knows all or none; export to a Hugging Face folder")


def gguf_caveats(config: ModelConfig) -> list[str]:
    """What llama.cpp will compute otherwise, a line each."""
    if config.moe is None or not config.moe.norm_topk:
        return []
    return ["norm_topk_prob: llama.cpp does not renormalise the experts' weights of this architecture; its answers will differ"]


def gguf_metadata(config: ModelConfig, tokenizer: Tokenizer, generation: GenerationDefaults, name: str) -> dict[str, Any]:
    """Everything in a GGUF file's header but the tensors."""
    return config.to_gguf(name) | tokenizer.to_gguf(config.vocab) | sampling_to_gguf(generation)


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
