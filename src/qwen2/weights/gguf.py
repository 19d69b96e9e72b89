"""GGUF files as a source of tensors: the header by the bounded reader, the data piece by piece, split files as one.

Tensors are read by seek and read into memory of their own, so that a loaded model does not keep the file mapped, and are
unpacked through buffers of about a MB, so that loading takes the memory of the result only. `mapped` is for the formats that
need no unpacking.

What is left out: which tensor is which parameter (`gguf_names.py`, `gguf_source.py`), and writing (`gguf_write.py`).

    with GGUFFile.open("model.gguf") as file:
        weight = file.tensor("blk.0.ffn_up.weight", dtype=torch.bfloat16)
"""

from __future__ import annotations

import mmap
import re
import threading
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING

from qwen2.weights.gguf_header import Header, TensorInfo, Value, read_header

if TYPE_CHECKING:
    import numpy as np
    import torch

    from qwen2.quant import Format
    from qwen2.weights.pack import Place

PIECE = 1 << 20  # weights read and unpacked at a time by each thread
MAX_PARTS = 1024
PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

__all__ = ["GGUFFile", "Split", "TensorInfo"]


@dataclass(frozen=True)
class Split:
    """How many files the model lies in, as the first of them says."""

    count: int
    paths: tuple[Path, ...]


class GGUFFile:
    """An open GGUF file, or the files of a split one. Several threads may read from it."""

    def __init__(self, path: Path, header: Header, split: Split, tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.version = header.version
        self.alignment = header.alignment
        self.metadata: dict[str, Value] = header.metadata
        self.tensors = tensors
        self.split = split
        self._lock = threading.Lock()
        self._streams: dict[int, IO[bytes]] = {}
        self._maps: dict[int, mmap.mmap] = {}

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Open a file; of a split model the first part, which brings the others.

        Raises ValueError for a file that is not well-formed GGUF, FileNotFoundError if it or a part of it is missing.
        """
        path = Path(path)
        header = read_header(path)
        split = find_parts(path, header)
        tensors = dict(header.tensors)
        for number, part in enumerate(split.paths[1:], start=1):
            for name, info in read_part(part, number, split).tensors.items():
                if name in tensors:
                    raise ValueError(f"{part}: tensor {name!r} is also in {split.paths[tensors[name].part].name}; download the parts again")
                tensors[name] = replace(info, part=number)
        announced = header.metadata.get("split.tensors.count", len(tensors))
        if split.count > 1 and announced != len(tensors):
            raise ValueError(f"{path}: {announced} tensors are announced and the parts hold {len(tensors)}; download the parts again")
        return cls(path, header, split, tensors)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files. What `mapped` gave out stays valid as long as it is in use."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self._maps.clear()

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ValueError(f"{self.path}: there is no tensor {name!r}; the file holds {len(self.tensors)} others")
        return self.tensors[name]

    def raw(self, name: str) -> np.ndarray:
        """Exactly this tensor's bytes: (nbytes,) uint8 in memory of its own."""
        import numpy as np

        info = self.info(name)
        data = np.empty(info.nbytes, dtype=np.uint8)
        self._read(info, 0, data.data)
        return data

    def piece(self, name: str, start: int, size: int) -> np.ndarray:
        """`size` bytes of this tensor from byte `start` on, in memory of their own. ValueError where it does not reach so far."""
        import numpy as np

        info = self.info(name)
        if not 0 <= start <= start + size <= info.nbytes:
            raise ValueError(f"{self.path}: tensor {name!r} has {info.nbytes} bytes, {start + size} are wanted")
        data = np.empty(size, dtype=np.uint8)
        self._read(info, start, data.data)
        return data

    def place(self, name: str, start: int) -> Place:
        """Where this tensor lies from byte `start` on, in a file that stays open as long as this one."""
        from qwen2.weights.pack import Place

        info = self.info(name)
        with self._lock:
            return Place(self._stream(info.part).fileno(), info.offset + start, self.split.paths[info.part])

    def supported(self, name: str) -> Format:
        """The format of a tensor; ValueError where it is one that is not supported."""
        return self._supported(self.info(name))

    def mapped(self, name: str) -> np.ndarray:
        """This tensor's bytes as a view of the file: (nbytes,) uint8, read from disk when touched.

        The mapping is private: writing to it changes neither the file nor another view's reader.
        """
        import numpy as np

        info = self.info(name)
        with self._lock:
            if info.part not in self._maps:
                self._maps[info.part] = mmap.mmap(self._stream(info.part).fileno(), 0, access=mmap.ACCESS_COPY)
        return np.frombuffer(self._maps[info.part], dtype=np.uint8, count=info.nbytes, offset=info.offset)

    def tensor(
        self, name: str, dtype: torch.dtype | None = None, out: torch.Tensor | None = None, index: int | None = None
    ) -> torch.Tensor:
        """Read and unpack a tensor into `out` (contiguous) or a new tensor of `dtype` (default float32).

        `index` takes only that slice of the outermost dimension: one expert of a stack. Raises ValueError if the format is one
        that is not supported, or `out` has another shape.
        """
        import torch

        from qwen2.quant import dequantize
        from qwen2.quant.tensors import in_threads

        info = self.info(name)
        form = self._supported(info)
        shape = info.shape if index is None else info.shape[1:]
        if out is None:
            out = torch.empty(shape, dtype=dtype or torch.float32)
        if tuple(out.shape) != shape:
            raise ValueError(f"{self.path}: tensor {name!r} has shape {shape}, and {tuple(out.shape)} is wanted")
        flat = out.view(-1)
        first = 0 if index is None else form.size(prod(shape)) * index

        def fill(start: int) -> None:
            piece = flat[start : start + PIECE]
            data = torch.empty(form.size(piece.numel()), dtype=torch.uint8)
            self._read(info, first + form.size(start), data.numpy().data)
            dequantize(data, info.type, (piece.numel(),), out=piece)

        in_threads(fill, range(0, flat.numel(), PIECE))
        return out

    def _supported(self, info: TensorInfo) -> Format:
        from qwen2.quant import FORMATS

        if info.type not in FORMATS:
            names = ", ".join(form.name for form in FORMATS.values())
            what = f"tensor {info.name!r} is stored as {info.type_name}, which is not supported"
            raise ValueError(f"{self.path}: {what}; supported are {names}")
        return FORMATS[info.type]

    def _stream(self, part: int) -> IO[bytes]:
        if part not in self._streams:
            self._streams[part] = self.split.paths[part].open("rb", buffering=0)
        return self._streams[part]

    def _read(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fill `into` from this byte of the tensor on (no pread: Windows has none)."""
        with self._lock:
            stream = self._stream(info.part)
            stream.seek(info.offset + start)
            done = 0
            while done < len(into):
                count = stream.readinto(into[done:])  # type: ignore[attr-defined]
                if not count:
                    what = f"tensor {info.name!r} ends early, the file became shorter since it was opened"
                    raise ValueError(f"{self.split.paths[info.part]}: {what}; download it again")
                done += count


def find_parts(path: Path, header: Header) -> Split:
    """The files of a split model, by the first one's name and metadata."""
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):
        return Split(1, (path,))
    if not isinstance(count, int) or not 1 <= count <= MAX_PARTS:
        raise ValueError(f"{path}: split.count {count!r} is not a number from 1 to {MAX_PARTS}; download the file again")
    named = PART_NAME.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise ValueError(f"{path}: the file is one of {count} parts; its name must end in -00001-of-{count:05}.gguf, beside the others")
    number = header.metadata.get("split.no")
    first = f"{named['stem']}-00001-of-{count:05}.gguf"
    if number != 0 or int(named["number"]) != 1:
        raise ValueError(f"{path}: the file is part {named['number']} of {count}; open the first part, {first}")
    paths = tuple(path.with_name(f"{named['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise FileNotFoundError(f"{path}: of {count} parts are missing {', '.join(missing)}; put them into the same folder")
    return Split(count, paths)


def read_part(path: Path, number: int, split: Split) -> Header:
    header = read_header(path)
    found = header.metadata.get("split.no"), header.metadata.get("split.count")
    if found != (number, split.count):
        raise ValueError(f"{path}: split.no and split.count are {found}, not {(number, split.count)}; download the parts again")
    return header
