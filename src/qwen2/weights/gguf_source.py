"""The tensors of a GGUF file by the decoder's parameter names.

Matrices whose stored type is the wanted one stay memory-mapped; others are unpacked a few MB at a time straight into their place,
so that loading needs no more memory than the result. Llama files come with q and k rows in another order, put right here.

What is left out: the header and the data's layout (gguf.py), names (gguf_names.py), and computing on blocks as they are.
"""

# E experts, F expert feed-forward size, D hidden

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import torch

from qwen2.model import PackedEmbedding
from qwen2.quant import FORMATS, dequantize, format_id, quantize
from qwen2.weights.gguf_names import gguf_names, hf_name, unpermute
from qwen2.weights.mixes import mix_of
from qwen2.weights.pack import POSITIONED, Rows

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor

    from qwen2.config import ModelConfig
    from qwen2.weights.gguf import GGUFFile

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GGML_TYPES = {dtype: format_id(name) for name, dtype in PLAIN.items()}


class GGUFSource:
    """The tensors of an open GGUF file. Raises ValueError, naming the tensor, where one is missing, unknown or misshapen."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.file, self.config = file, config
        self.may_lack_biases = self.heads_permuted = file.metadata.get("general.architecture") == "llama"
        self.unread = set(file.tensors)

    def dtype(self) -> torch.dtype | None:
        """The type of the matrices where it is a plain one, None where they are block-quantized."""
        counts = Counter(FORMATS[info.type].name for info in self.file.tensors.values() if len(info.shape) > 1 and info.type in FORMATS)
        return PLAIN.get(counts.most_common(1)[0][0]) if counts else None

    def has(self, name: str) -> bool:
        return all(part in self.file.tensors for part in gguf_names(name, self.config))

    def in_blocks(self, name: str) -> bool:
        """Whether this parameter is stored in a block format."""
        return all(FORMATS[info.type].block > 1 for part in gguf_names(name, self.config) if (info := self.file.info(part)).type in FORMATS)

    def load(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The parameter `name` as (shape) of `dtype` on `device`."""
        parts = gguf_names(name, self.config)
        self.unread.difference_update(parts)
        if len(parts) == 1:
            return self._whole(parts[0], name, shape, dtype).to(device)
        stacked = torch.empty(shape, dtype=dtype)  # (E, 2F, D): gate over up, expert by expert
        for row, part in enumerate(parts):
            for expert, place in enumerate(stacked.unbind(0)):
                self.file.tensor(part, out=place.chunk(len(parts))[row], index=expert)
        return stacked.to(device)

    def packed(self, name: str, dtype: torch.dtype) -> PackedEmbedding | None:
        """The embedding as it lies in the file, mapped, where it is in blocks; None where it is of a plain type."""
        (part,) = gguf_names(name, self.config)
        info = self.file.info(part)
        if info.type not in FORMATS or FORMATS[info.type].name in PLAIN:
            return None
        self.unread.discard(part)
        return PackedEmbedding(torch.from_numpy(self.file.mapped(part)), info.type, (info.shape[0], info.shape[1]), dtype)

    def stored(self, part: str, ggml_type: int) -> Callable[[], np.ndarray] | None:
        """How to read this tensor's bytes, rows in a qwen2 file's order, where they are of the type already."""
        if part not in self.file.tensors or self.file.info(part).type != ggml_type:
            return None
        shape = self.file.info(part).shape
        order = self._order(hf_name(part, self.config), shape[0]) if len(shape) == 2 else None
        if order is None:
            return partial(self.file.raw, part)
        return lambda: self.file.raw(part).reshape(shape[0], -1)[order.numpy()].reshape(-1)

    def rows(self, name: str, shape: torch.Size, dtype: torch.dtype | None) -> list[Rows]:
        """The matrices behind a parameter, as their file's rows or widened to `dtype`; of experts each expert's, gate before up."""
        parts = gguf_names(name, self.config)
        self.unread.difference_update(parts)
        if len(shape) == 2:
            return [self._rows(parts[0], 0, shape[0], shape[1], dtype, self._order(name, shape[0]))]
        experts, height = shape[0], shape[1] // len(parts)
        return [self._rows(part, expert * height, height, shape[2], dtype, None) for expert in range(experts) for part in parts]

    def _rows(self, part: str, start: int, rows: int, columns: int, dtype: torch.dtype | None, order: Tensor | None) -> Rows:
        """`rows` rows of a tensor from its row `start` on; `order` puts a whole tensor's rows right."""
        info, form = self.file.info(part), self.file.supported(part)
        row_bytes = form.size(columns)

        def read(first: int, count: int) -> np.ndarray:
            if order is not None:
                whole = self.file.raw(part).reshape(-1, row_bytes)
                chosen: np.ndarray = whole[order[first : first + count].numpy()]
                return chosen.reshape(-1)
            return self.file.piece(part, (start + first) * row_bytes, count * row_bytes)

        if dtype is None or PLAIN.get(form.name) == dtype:
            return Rows(info.type, rows, columns, read, self.file.place(part, start * row_bytes) if order is None and POSITIONED else None)
        to = GGML_TYPES[dtype]

        def cast(first: int, count: int) -> np.ndarray:
            return quantize(dequantize(read(first, count), info.type, (count, columns)), to)

        return Rows(to, rows, columns, cast)

    def _order(self, name: str, rows: int) -> Tensor | None:
        """Where each row of a Llama's q or k lies in the file; None where the rows are in order."""
        if not self.heads_permuted or not (".q_proj." in name or ".k_proj." in name):
            return None
        return unpermute(torch.arange(rows)[:, None], self.config.heads if ".q_proj." in name else self.config.kv_heads)[:, 0]

    def _whole(self, part: str, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        info = self.file.info(part)
        stored = PLAIN.get(FORMATS[info.type].name) if info.type in FORMATS else None
        if stored == dtype and len(info.shape) > 1:
            tensor = torch.from_numpy(self.file.mapped(part)).view(dtype).view(info.shape)
        else:
            tensor = self.file.tensor(part, dtype=dtype)
        if self.heads_permuted and (".q_proj." in name or ".k_proj." in name):
            tensor = unpermute(tensor, self.config.heads if ".q_proj." in name else self.config.kv_heads)
        return tensor.view(shape)  # (D,) -> (1, D) for the shared expert's gate

    def check_rest(self) -> None:
        """Refuse tensors that no parameter asked for."""
        for name in sorted(self.unread):
            hf_name(name, self.config)  # names one that the architecture does not have
        if self.unread:
            raise ValueError(f"{self.file.path}: {len(self.unread)} tensors are not used, the first is {min(self.unread)}")

    def format(self) -> str:
        """The mix of types as people name it: the most frequent one among the matrices' weights."""
        return mix_of(self.file)
