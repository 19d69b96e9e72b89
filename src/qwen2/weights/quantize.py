"""Make a GGUF file of a smaller type from a model, one tensor at a time: the network is never in memory as a whole.

What is left out: the blocks' searches (quant/), the mixes (mixes.py), and calibration on text.

    with open_plan(path, "Q4_K_M") as plan:
        plan.write(Path("model-q4_k_m.gguf"))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen2.model import Qwen2
from qwen2.weights.export import check_layers, check_place, gguf_caveats, gguf_metadata
from qwen2.weights.gguf_source import GGUFSource
from qwen2.weights.gguf_write import TensorToWrite, gguf_tensors, write_gguf
from qwen2.weights.mixes import PLAIN, mix_named
from qwen2.weights.model import Opened, open_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")


class Parameters(Mapping[str, Tensor]):
    """A model's parameters in float32 by name, each read when it is asked for; the last one is kept."""

    def __init__(self, opened: Opened) -> None:
        network = Qwen2(opened.config, dtype=torch.float32, device="meta")
        self.shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        self.source, self._last = opened.source, ("", torch.empty(0))
        biases = [name for name in self.shapes if name.endswith(".bias")]
        self.lacking = set(biases) if opened.source.may_lack_biases and not any(map(opened.source.has, biases)) else set()

    def __getitem__(self, name: str) -> Tensor:
        if name in self.lacking:
            return torch.zeros(self.shapes[name])
        if self._last[0] != name:
            self._last = ("", torch.empty(0))
            self._last = (name, self.source.load(name, self.shapes[name], torch.float32, CPU))
        return self._last[1]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class Plan:
    """What a file will hold, and what to know of it before."""

    opened: Opened
    name: str
    mix: str
    tensors: list[TensorToWrite]
    notes: list[str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def weights(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    def write(self, path: Path, watch: Callable[[TensorToWrite], None] | None = None) -> None:
        """Write the file; it appears when it is complete. Raises FileExistsError, ValueError for weights that are not finite, OSError."""
        check_place(path, "file")
        opened = self.opened
        metadata = gguf_metadata(opened.config, opened.tokenizer, opened.generation, self.name)
        write_gguf(path, metadata, self.tensors, self.mix, watch)


@contextmanager
def open_plan(path: Path, mix: str, name: str = "") -> Iterator[Plan]:
    """Open a model's files and plan the mix; while it is open, it can be written. Raises ValueError naming what is wrong.

    A tensor that is of its new type already keeps its bytes, rows put into a qwen2 file's order.
    """
    mix = mix_named(mix)
    with open_files(path) as opened:
        check_layers(opened.config)
        tensors, notes = gguf_tensors(opened.config, Parameters(opened), mix)
        if isinstance(opened.source, GGUFSource):
            tensors = [_kept(tensor, opened.source) for tensor in tensors]
        if opened.dtype is None and mix not in PLAIN:
            notes.insert(0, f"the weights are {opened.weight_format}, whose loss comes on top: F16 or BF16 weights are a better source")
        if isinstance(opened.source, GGUFSource) and opened.source.may_lack_biases:
            notes.append("the file is of the llama architecture and the new one of qwen2, with biases of zero: the same model")
        notes += gguf_caveats(opened.config)
        yield Plan(opened, name, mix, tensors, notes)


def _kept(tensor: TensorToWrite, source: GGUFSource) -> TensorToWrite:
    raw = source.stored(tensor.name, tensor.type)
    if raw is None:
        return tensor
    kept = f"{tensor.choice.reason}; the file has it so" if len(tensor.shape) > 1 else tensor.choice.reason
    return replace(tensor, raw=raw, choice=replace(tensor.choice, reason=kept))
