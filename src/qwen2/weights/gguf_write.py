"""Writing GGUF files: which tensors in which format (`gguf_tensors`), and the file itself (`write_gguf`).

The bytes of the header are the gguf package's writer's. Tensors are packed one at a time as they are written; the file appears
under its name when it is complete. What is left out: splitting, and Llama's architecture: a model loaded from a Llama file is
written as the qwen2 with zero biases that it has become.

    tensors, notes = gguf_tensors(config, dict(network.named_parameters()), "Q8_0")
    write_gguf(path, config.to_gguf("My model") | tokenizer.to_gguf(), tensors, "Q8_0")
"""
# E experts, F expert feed-forward size, D hidden

from __future__ import annotations

import errno
import math
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from torch import Tensor

from qwen2.config.gguf import gguf_shapes
from qwen2.config.model import ModelConfig
from qwen2.quant import FORMATS, dequantize, quantize
from qwen2.weights.gguf_names import gguf_names, hf_name
from qwen2.weights.mixes import MIXES, Choice, choose, mix_named

CODES = {"B": "UINT8", "b": "INT8", "H": "UINT16", "h": "INT16", "I": "UINT32", "i": "INT32", "f": "FLOAT32"}
CODES |= {"Q": "UINT64", "q": "INT64", "d": "FLOAT64"}
CHECKED = 1 << 24  # weights unpacked at a time to see whether they are numbers
LARGEST = 65504.0  # what an fp16 number can hold: a weight in F16, a scale of a block


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor: its name, shape (rows first), type, and how to get its weights, or its very bytes, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    choice: Choice
    load: Callable[[], Tensor]
    raw: Callable[[], np.ndarray] | None = None

    @property
    def type(self) -> int:
        return self.choice.number

    @property
    def nbytes(self) -> int:
        return FORMATS[self.type].size(prod(self.shape))


def gguf_tensors(config: ModelConfig, parameters: Mapping[str, Tensor], form: str) -> tuple[list[TensorToWrite], list[str]]:
    """What a GGUF file of these parameters holds in the mix `form`, and a line for each kind of matrix that it could not hold.

    A parameter is asked for when its tensor is written. Raises ValueError for an unknown form or a missing parameter.
    """
    mix = mix_named(form)
    shapes = gguf_shapes(config)
    if config.moe is not None and config.tied:
        shapes["output.weight"] = shapes["token_embd.weight"]  # llama.cpp ties no mixture of experts: the embedding is written twice
    tensors = []
    for name, shape in shapes.items():
        ours = hf_name(name, config)
        if name == "output.weight" and config.tied:
            ours = hf_name("token_embd.weight", config)
        if ours not in parameters:
            raise ValueError(f"parameter {ours} is missing, from which GGUF tensor {name} is written")
        tensors.append(TensorToWrite(name, shape, choose(name, shape, config, mix), partial(_part, parameters, name, ours, config)))
    return tensors, _notes(tensors)


def _notes(tensors: Sequence[TensorToWrite]) -> list[str]:
    """Which matrices are of another type than the mix asks for, a line for each kind."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        if tensor.choice.instead_of is not None:
            kinds.setdefault((tensor.choice.reason, tensor.choice.type), []).append(tensor.name)
    notes = []
    for (reason, held), names in kinds.items():
        which = names[0] if len(names) == 1 else f"{len(names)} matrices from {names[0]} on"
        notes.append(f"{which}: {reason}; written as {held}")
    return notes


def _part(parameters: Mapping[str, Tensor], name: str, ours: str, config: ModelConfig) -> Tensor:
    """The tensor `name` out of the parameter that holds it: itself, or the gate or up half of stacked experts (E, 2F, D)."""
    sources, parameter = gguf_names(ours, config), parameters[ours]
    if len(sources) == 1:
        return parameter.detach()
    return parameter.detach().chunk(len(sources), dim=1)[sources.index(name)]


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorToWrite],
    form: str,
    watch: Callable[[TensorToWrite], None] | None = None,
) -> None:
    """Write a GGUF file (version 3); `metadata` holds `general.architecture` and Python values (see `value_type`).

    `watch` is called with each tensor when it is written.
    Raises ValueError for weights that the format cannot hold, OSError if the disk is full or the folder cannot be written to.
    """
    values = dict(metadata) | {"general.file_type": MIXES[mix_named(form)], "general.quantization_version": 2}
    check_space(path, tensors)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    writer = GGUFWriter(None, values.pop("general.architecture"))
    try:
        for key, value in values.items():
            add_value(writer, key, value)
        for tensor in tensors:
            kind = GGMLQuantizationType(tensor.type)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file(draft)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(packed(tensor))
            if watch is not None:
                watch(tensor)
        writer.close()
        os.replace(draft, path)
    finally:
        writer.close()
        draft.unlink(missing_ok=True)


def check_space(path: Path, tensors: Iterable[TensorToWrite]) -> None:
    needed = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{path}: the file needs {needed} bytes and the disk has {free} free; make room or write elsewhere")


def packed(tensor: TensorToWrite) -> np.ndarray:
    """The tensor's bytes in its format."""
    if tensor.raw is not None:
        raw = tensor.raw()
        _check_finite(tensor, raw)
        return raw
    weights = tensor.load().cpu()
    assert weights.numel() == prod(tensor.shape), f"{tensor.name}: {tuple(weights.shape)} is not {tensor.shape}"
    form = FORMATS[tensor.type].name
    limit = LARGEST * (127 if form == "Q8_0" else 1)
    largest = float(weights.abs().amax()) if form not in ("F32", "BF16") else 0.0
    if not math.isfinite(largest):
        raise ValueError(f"tensor {tensor.name} has weights that are not finite: the file it comes from is damaged; fetch it again")
    if largest > limit:
        raise ValueError(f"tensor {tensor.name} has a weight of magnitude {largest:g}, and {form} ends at {limit:g}; write BF16")
    return quantize(weights.reshape(tensor.shape), tensor.type)


def _check_finite(tensor: TensorToWrite, raw: np.ndarray) -> None:
    """ValueError where blocks that are copied as they are hold what is no number."""
    form = FORMATS[tensor.type]
    step = max(1, CHECKED // form.block) * form.bytes
    for start in range(0, len(raw), step):
        piece = raw[start : start + step]
        if not bool(dequantize(piece, tensor.type, (len(piece) // form.bytes * form.block,)).isfinite().all()):
            raise ValueError(f"tensor {tensor.name} has weights that are not finite: the file it comes from is damaged; fetch it again")


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    if key == "general.alignment":
        writer.add_custom_alignment(value)
        return
    kind, element = value_type(key, value)
    if kind == GGUFValueType.ARRAY:
        value = list(value)
    writer.add_key_value(key, value, kind, element)


def value_type(key: str, value: Any) -> tuple[GGUFValueType, GGUFValueType | None]:
    """How a Python value is written: bool, int as UINT32 (else as what holds it), float as FLOAT32, str; lists of one of these.

    Lists of int are INT32; an `array.array` keeps its own width.
    """
    if isinstance(value, bool):
        return GGUFValueType.BOOL, None
    if isinstance(value, int):
        fits = (("UINT32", 0, 32), ("INT32", -(1 << 31), 31), ("INT64", -(1 << 63), 63), ("UINT64", 0, 64))
        return GGUFValueType[next(name for name, low, bits in fits if low <= value < 1 << bits)], None
    if isinstance(value, float):
        return GGUFValueType.FLOAT32, None
    if isinstance(value, str):
        return GGUFValueType.STRING, None
    if isinstance(value, array):
        return GGUFValueType.ARRAY, GGUFValueType[CODES[value.typecode]]
    if isinstance(value, Sequence) and len(value):
        for kind, name in ((bool, "BOOL"), (str, "STRING"), (int, "INT32"), (float, "FLOAT32")):
            if all(isinstance(item, kind) for item in value):
                return GGUFValueType.ARRAY, GGUFValueType[name]
    raise ValueError(f"GGUF key {key}: a value of type {type(value).__name__} cannot be written")
