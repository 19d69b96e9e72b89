"""Checkpoints: everything that a run needs to go on bit for bit, in a folder that is there whole or not at all.

`step-000120/` holds `state.json` (step, counts, data position, random states, the model's config, each file's size and sha256) and the
files of weights, both moments of the optimizer, and averaged weights. It is written under a temporary name, brought to the disk,
then renamed; a process killed at any moment leaves the checkpoints before it as they were. What is damaged is passed over with a
line that names it. Nothing is pickled.

Left out: how tensors are laid into files, which is the world's (world.py, tensors.py).
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen2.data.shards import sha256_of
from qwen2.weights.json_object import read_json

if TYPE_CHECKING:
    from torch import nn

    from qwen2.train.optim import Average
    from qwen2.train.world import World

STATE = "state.json"
FORMAT = 1
NAME = re.compile(r"step-(\d{6,})")
DRAFT = ".part"


def tensors_of(network: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None) -> dict[str, Tensor]:
    """All tensors of a run's state by name; filling them in place restores it."""
    found: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        found[f"model/{name}"] = parameter
        if parameter in optimizer.state:
            found |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    if average is not None:
        found |= {f"average/{name}": tensor for name, tensor in average.weights.items()}
    return found


def save(folder: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor], world: World, keep: int) -> Path:
    """Write the checkpoint of a step and remove all but the newest `keep`; returns its folder.

    OSError where it cannot be written: what was written of it is gone, and the earlier ones are as they were.
    """
    place, draft = folder / f"step-{step:06d}", folder / f"step-{step:06d}{DRAFT}"
    try:
        if world.main:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            check_room(draft, tensors)
        world.barrier()
        names = world.write(draft, tensors)
        world.barrier()
        if world.main:
            files = {name: [(draft / name).stat().st_size, sha256_of(draft / name)] for name in names}
            text = json.dumps({"format": FORMAT, "step": step, "files": files, "random": random_state(world), **state}, indent=1)
            (draft / STATE).write_text(text + "\n", encoding="utf-8")
            for name in (*names, STATE):
                to_disk(draft / name)
            to_disk(draft)
            if place.exists():  # a run that went back passes the same steps again
                shutil.rmtree(place)
            os.rename(draft, place)
            to_disk(folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        earlier = [path.name for path in numbered(folder)]
        whole = f"{earlier[-1]} is whole: make room and go on with --resume" if earlier else "there is none before it"
        raise OSError(error.errno, f"the checkpoint could not be written ({error.strerror}); {whole}", str(place)) from None
    if world.main:
        for old in numbered(folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return place


def check_room(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """OSError before anything is written, where the disk has less room than a checkpoint of one rank takes."""
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"it takes {needed:,} bytes, the disk has {free:,} free", str(folder))


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a run by step, the newest last."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; None where there is none at all.

    Damaged ones are passed over with a line each; what a killed process left half written is removed. ValueError where all are
    damaged.
    """
    for half in folder.glob(f"step-*{DRAFT}"):
        say(f"{half}: half written when the run was killed; removed")
        shutil.rmtree(half)
    found = numbered(folder)
    for path in reversed(found):
        try:
            return path, checked(path)
        except (ValueError, OSError) as error:
            say(f"{path}: passed over: {error}")
    if found:
        raise ValueError(f"{folder}: none of the {len(found)} checkpoints is whole; start a new run")
    return None


def checked(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, every file of which is as it was written; else ValueError or FileNotFoundError naming it."""
    state = read_json(path / STATE)
    if state.get("format") != FORMAT:
        raise ValueError(f"{STATE}: format {state.get('format')!r}, this version reads {FORMAT}")
    for name, (size, digest) in state["files"].items():
        there = path / name
        if not there.is_file():
            raise FileNotFoundError(errno.ENOENT, "is missing", name)
        if there.stat().st_size != size:
            raise ValueError(f"{name} has {there.stat().st_size:,} bytes instead of {size:,}: cut short")
        if sha256_of(there) != digest:
            raise ValueError(f"{name} is not what was written: damaged")
    return state


def check_fits(path: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """ValueError naming the first key of the model's config that differs."""
    for key in dict.fromkeys((*ours, *saved)):
        if saved.get(key) != ours.get(key):
            raise ValueError(f"{path}: its model has {key} {saved.get(key)!r}, this run's has {ours.get(key)!r}")


def random_state(world: World) -> dict[str, Any]:
    """The states of all generators that a step may draw from, on the main rank."""
    version, numbers, gauss = random.getstate()
    states = {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state().numpy().tobytes().hex()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device).numpy().tobytes().hex()
    return states


def restore_random(states: Mapping[str, Any], world: World) -> None:
    """Put the generators where they stood."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["torch"]), dtype=torch.uint8))
    if "cuda" in states and world.device.type == "cuda":
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(states["cuda"]), dtype=torch.uint8), world.device)
