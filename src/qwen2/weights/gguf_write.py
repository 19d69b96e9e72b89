"""Writing GGUF files: which tensors in which format (`gguf_tensors`), and the file itself (`write_gguf`).

The bytes of the header are the gguf package's writer's. Tensors are packed one at a time as they are written; the file appears
under its name when it is complete. What is left out: 4- to 6-bit formats (read only), splitting, and Llama's architecture: a
model loaded from a Llama file is written as the qwen2 with zero biases that it has become.

    tensors, notes = gguf_tensors(config, dict(network.named_parameters()), "Q8_0")
    write_gguf(path, config.to_gguf("My model") | tokenizer.to_gguf(), tensors, "Q8_0")
"""
# E experts, F expert feed-forward size, D hidden

from __future__ import annotations

import errno
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
from qwen2.quant import FORMATS, format_id, quantize
from qwen2.weights.gguf_names import gguf_names, hf_name

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type, llama.cpp's numbers
CODES = {"B": "UINT8", "b": "INT8", "H": "UINT16", "h": "INT16", "I": "UINT32", "i": "INT32", "f": "FLOAT32"}
CODES |= {"Q": "UINT64", "q": "INT64", "d": "FLOAT64"}
LARGEST = {"F16": 65504.0, "Q8_0": 65504.0 * 127}  # magnitudes that the format's fp16 numbers can hold


@dataclass(frozen=True)
class TensorToWrite:
    """One tensor: its name, shape (rows first), ggml type, and how to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    type: int
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return FORMATS[self.type].size(prod(self.shape))


def writable(name: str) -> int:
    """The ggml id of a format that can be written. Raises ValueError naming those that can."""
    if name.upper() not in FILE_TYPES:
        raise ValueError(f"GGUF format {name!r} cannot be written; choose one of {', '.join(FILE_TYPES)}")
    return format_id(name)


def gguf_tensors(config: ModelConfig, parameters: Mapping[str, Tensor], form: str) -> tuple[list[TensorToWrite], list[str]]:
    """What a GGUF export of these parameters holds, and a line for each matrix that could not be stored in `form`.

    Norms, biases and the router are always F32. Raises ValueError for an unknown form or a missing parameter.
    """
    wanted = writable(form)
    shapes = gguf_shapes(config)
    if config.moe is not None and config.tied:
        shapes["output.weight"] = shapes["token_embd.weight"]  # llama.cpp ties no mixture of experts: the embedding is written twice
    tensors, notes = [], []
    for name, shape in shapes.items():
        ours = hf_name(name, config)
        if name == "output.weight" and config.tied:
            ours = hf_name("token_embd.weight", config)
        if ours not in parameters:
            raise ValueError(f"parameter {ours} is missing, from which GGUF tensor {name} is written")
        chosen = 0 if len(shape) == 1 or name.endswith("ffn_gate_inp.weight") else wanted
        if shape[-1] % FORMATS[chosen].block:
            blocks = f"{FORMATS[chosen].name} blocks of {FORMATS[chosen].block}"
            notes.append(f"{name}: rows of {shape[-1]} weights are not whole {blocks}; written as F32")
            chosen = 0
        tensors.append(TensorToWrite(name, shape, chosen, partial(_part, parameters[ours], name, ours, config)))
    return tensors, notes


def _part(parameter: Tensor, name: str, ours: str, config: ModelConfig) -> Tensor:
    """The tensor `name` out of the parameter that holds it: itself, or the gate or up half of stacked experts (E, 2F, D)."""
    sources = gguf_names(ours, config)
    if len(sources) == 1:
        return parameter.detach()
    return parameter.detach().chunk(len(sources), dim=1)[sources.index(name)]


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorToWrite], form: str) -> None:
    """Write a GGUF file (version 3); `metadata` holds `general.architecture` and Python values (see `value_type`).

    Raises ValueError for weights that the format cannot hold, OSError if the disk is full or the folder cannot be written to.
    """
    values = dict(metadata) | {"general.file_type": FILE_TYPES[form.upper()], "general.quantization_version": 2}
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
    weights = tensor.load().cpu()
    assert weights.numel() == prod(tensor.shape), f"{tensor.name}: {tuple(weights.shape)} is not {tensor.shape}"
    form = FORMATS[tensor.type].name
    if form in LARGEST and float(largest := weights.abs().amax()) > LARGEST[form]:
        what = f"tensor {tensor.name} has a weight of magnitude {float(largest):g}"
        raise ValueError(f"{what}, and {form} ends at {LARGEST[form]:g}; write BF16")
    return quantize(weights.reshape(tensor.shape), tensor.type)


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
