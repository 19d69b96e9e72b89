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
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen2.data.shards import sha256_of
from qwen2.train.folder import numbered
from qwen2.train.tensors import to_disk
from qwen2.train.world import World
from qwen2.weights.json_object import read_json

if TYPE_CHECKING:
    from torch import nn

    from qwen2.train.optim import Average

STATE = "state.json"
FORMAT = 1
DRAFT, ASIDE = ".part", ".old"


def tensors_of(network: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None) -> dict[str, Tensor]:
    """All tensors of a run's state by name; filling them in place restores it. Weights that are not trained are no part of it."""
    found: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
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
        files = world.write(draft, tensors)
        if world.main:
            text = json.dumps({"format": FORMAT, "step": step, "files": files, "random": random_state(world), **state}, indent=1)
            (draft / STATE).write_text(text + "\n", encoding="utf-8")
            to_disk(draft / STATE)
            to_disk(draft)
            put(draft, place)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if world.main:
            restore_aside(folder)
        earlier = [path.name for path in numbered(folder)]
        whole = f"{earlier[-1]} is whole: make room and go on with --resume" if earlier else "there is none before it"
        raise OSError(error.errno, f"the checkpoint could not be written ({error.strerror}); {whole}", str(place)) from None
    if world.main:
        for old in numbered(folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return place


def put(draft: Path, place: Path) -> None:
    """Give a whole checkpoint its name. One that has it (a damaged one, whose steps came again) goes, but not before."""
    aside = place.with_name(place.name + ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    if place.exists():
        os.rename(place, aside)
    os.rename(draft, place)
    to_disk(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def restore_aside(folder: Path) -> None:
    """What was put aside gets its name back where nothing took it, else it goes."""
    for aside in folder.glob(f"step-*{ASIDE}"):
        place = aside.with_name(aside.name.removesuffix(ASIDE))
        if place.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, place)


def check_room(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """OSError before anything is written, where the disk has less room than a checkpoint of one rank takes."""
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"it takes {needed:,} bytes, the disk has {free:,} free", str(folder))


def newest(folder: Path, say: Callable[[str], None], world: World | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; None where there is none at all. For who holds the run's lock.

    What a killed process left is put in order first: a checkpoint that lacks nothing but its name gets it, a half-written one goes.
    Damaged ones are passed over with a line each. ValueError where all are damaged.
    """
    world = World() if world is None else world
    if world.main:
        tidy(folder, say)
    return whole(folder, say, world)


def tidy(folder: Path, say: Callable[[str], None]) -> None:
    """Put in order what a process that was killed while it wrote has left."""
    for draft in folder.glob(f"step-*{DRAFT}"):
        place = draft.with_name(draft.name.removesuffix(DRAFT))
        try:
            checked(draft)
        except (ValueError, OSError):
            say(f"{draft}: half written when the run was killed; removed")
            shutil.rmtree(draft)
            continue
        put(draft, place)
        say(f"{place}: it was whole when the run was killed and lacked only its name")
    restore_aside(folder)


def whole(folder: Path, say: Callable[[str], None], world: World | None = None) -> tuple[Path, dict[str, Any]] | None:
    """As `newest`, but nothing is touched."""
    world = World() if world is None else world
    found = world.agreed(numbered(folder))
    for path in reversed(found):
        try:
            return path, checked(path, world)
        except (ValueError, OSError) as error:
            say(f"{path}: passed over: {error}")
    if found:
        raise ValueError(f"{folder}: none of the {len(found)} checkpoints is whole; start a new run")
    return None


def checked(path: Path, world: World | None = None) -> dict[str, Any]:
    """The state of a checkpoint, every file of which is as it was written; else ValueError or FileNotFoundError naming it.

    Every rank has to call it, and reads its share of the files.
    """
    world = World() if world is None else world
    state, fault = world.agreed(read_state(path) if world.main else ({}, None))
    if fault is None:
        names = sorted(state["files"])[world.rank :: world.size]
        fault = next((one for one in world.every(first_fault(path, state["files"], names)) if one is not None), None)
    if fault is not None:
        raise fault
    return state


Fault = ValueError | OSError


def read_state(path: Path) -> tuple[dict[str, Any], Fault | None]:
    """What state.json says, or why it says nothing."""
    try:
        state = read_json(path / STATE)
    except (ValueError, OSError) as error:
        return {}, error
    if state.get("format") != FORMAT:
        return {}, ValueError(f"{STATE}: format {state.get('format')!r}, this version reads {FORMAT}")
    return state, None


def first_fault(path: Path, files: Mapping[str, Any], names: Iterable[str]) -> Fault | None:
    """The first of these files that is not as it was written, in words."""
    for name in names:
        (size, digest), there = files[name], path / name
        try:
            if not there.is_file():
                return FileNotFoundError(errno.ENOENT, "is missing", name)
            if there.stat().st_size != size:
                return ValueError(f"{name} has {there.stat().st_size:,} bytes instead of {size:,}: cut short")
            if sha256_of(there) != digest:
                return ValueError(f"{name} is not what was written: damaged")
        except OSError as error:
            return error
    return None


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
