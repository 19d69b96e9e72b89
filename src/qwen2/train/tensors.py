"""Named tensors in a folder, as safetensors files of bounded size: how one process keeps weights and optimizer state.

Nothing is pickled. A tensor is never copied as a whole where it lies in the CPU's memory. The folder's owner checks the files'
digests (checkpoint.py); what is found here is that a name is missing, or that a shape is another's.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen2.data.shards import sha256_of

Digests = dict[str, list[object]]  # of files by name: [bytes, sha256]

FILE_BYTES = 4 << 30
NUMBER = re.compile(r"os error (\d+)")


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Write all into `folder`; returns the files' names. OSError where the disk is full or the folder cannot be written."""
    names: list[str] = []
    for group in _groups(tensors):
        name = f"tensors-{len(names):04d}.safetensors"
        own = {key: tensor.detach().to("cpu").contiguous() for key, tensor in group.items()}
        try:
            save_file(own, folder / name)
        except SafetensorError as error:  # the library's word for what the system said
            number = NUMBER.search(str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(folder / name)) from None
        names.append(name)
    return names


def digests(folder: Path, names: Iterable[str]) -> Digests:
    """Size and sha256 of these files, which are on the disk when it returns."""
    found: Digests = {}
    for name in names:
        path = folder / name
        found[name] = [path.stat().st_size, sha256_of(path)]
        to_disk(path)
    return found


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > FILE_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    if group:
        yield group


@torch.no_grad()
def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill each tensor in place with the one of its name in `folder`. ValueError where it is missing or has another shape."""
    waiting = dict(tensors)
    for path in sorted(folder.glob("tensors-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name not in waiting:
                    continue
                target, found = waiting.pop(name), file.get_tensor(name)
                if target.shape != found.shape:
                    raise ValueError(f"{path}: {name} has shape {list(found.shape)}, this run's has {list(target.shape)}")
                target.copy_(found)
    if waiting:
        raise ValueError(f"{folder}: {len(waiting)} tensors of this run are not there, the first is {min(waiting)}")
