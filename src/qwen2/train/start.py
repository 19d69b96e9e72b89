"""What a stage starts from: a model whose config and tokenizer are known at once, and whose weights stay where they lie until there is
a network to put them into, a tensor at a time, each rank its part. So no process holds the model a second time, and no rank of several
holds it whole.

Files and checkpoints are read that way. What is left out: adapters, whose base is changed in memory first, so that each process holds
that model in float32 until its part is taken.

    start = open_start("runs/short", print)
    network = start.network(start.config, World(), torch.float32)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen2.config import ModelConfig
from qwen2.model import Qwen2
from qwen2.tokenizer import Tokenizer
from qwen2.train.place import is_adapter, is_run
from qwen2.train.saved import config_of, ended, kept_checkpoint, of_adapters, of_checkpoint, take, tokenizer_of
from qwen2.train.world import World
from qwen2.weights.fill import whole_tensors
from qwen2.weights.model import Model, open_files
from qwen2.weights.store import Store

Read = Callable[[Qwen2, World], None]


@dataclass(frozen=True)
class Start:
    """A model to start from; `read` puts its weights into a network that has all of its parameters."""

    config: ModelConfig
    tokenizer: Tokenizer
    read: Read

    def check_fits(self, config: ModelConfig, source: str | None) -> None:
        """ValueError, with the name of `source`, where `config` has a parameter that is not there or of another shape."""
        given = shapes(self.config)
        for name, shape in shapes(config).items():
            if given.get(name) != shape:
                there = "is missing" if name not in given else f"has shape {list(given[name])}, not {list(shape)}"
                raise ValueError(f"{source}: {name} {there}: the model does not fit this stage's config")

    @torch.no_grad()
    def network(self, config: ModelConfig, world: World, dtype: torch.dtype) -> Qwen2:
        """A network of a config that fits with these weights, prepared; every rank has to call it."""
        network = world.empty_network(config, dtype)
        self.read(network, world)
        return network


def open_start(source: str | Path, say: Callable[[str], None]) -> Start:
    """A run's model, that of one of its checkpoints, a folder's, a file's or a name's. Errors as `saved.take` has them."""
    path = Path(source)
    if is_run(path) and (found := kept_checkpoint(path, say)) is not None:
        return of_model(of_checkpoint(*found, say, "float32")) if of_adapters(found[0]) else take_later(*found)
    if is_run(path) and ended(path) and (path / "model").is_dir():
        return of_files(path / "model")
    return of_model(take(source, say, dtype="float32")) if is_run(path) or is_adapter(path) else of_files(source)


def of_files(source: str | Path) -> Start:
    """A Hugging Face folder, a GGUF file, or a name of the store, which is held as long as this is."""
    store = Store()
    path, name, hold = store.open(source)
    if not store.is_path(source) and store.get(name).adapter_path is not None:
        return of_model(take(source, print, dtype="float32"))
    with open_files(path) as opened:
        config, tokenizer = opened.config, opened.tokenizer

    def read(network: Qwen2, world: World, _held: Any = hold) -> None:
        parameters = dict(network.named_parameters())
        with open_files(path) as opened:
            named = {name: parameter.shape for name, parameter in parameters.items()}
            for name, tensor in whole_tensors(opened.source, named, torch.float32, torch.device("cpu")):
                world.put(parameters[name], tensor)

    return Start(config, tokenizer, read)


def take_later(checkpoint: Path, state: dict[str, Any]) -> Start:
    """The model of a checkpoint that is whole; the averaged one, where there is one."""

    def read(network: Qwen2, world: World) -> None:
        place, kind = world.agreed((checkpoint, "average" if state["averaged"] else "model"))  # of a run that goes on each may see another
        if not place.is_dir():
            raise FileNotFoundError(f"{place}: gone since it was looked at: its run goes on and has newer ones; start again")
        world.read(place, {f"{kind}/{name}": parameter for name, parameter in network.named_parameters()})

    return Start(config_of(state), tokenizer_of(checkpoint), read)


def of_model(model: Model) -> Start:
    """A model in memory, which gives its weights away when they are read."""

    def read(network: Qwen2, world: World) -> None:
        given = dict(model.network.named_parameters())
        if any(parameter.is_meta for parameter in given.values()):
            raise ValueError(f"{model.path}: its weights were given to a run already; load it again")
        for name, parameter in network.named_parameters():
            world.put(parameter, given[name])
        model.network.to("meta")

    return Start(model.config, model.tokenizer, read)


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Each parameter's shape by its name."""
    return {name: parameter.shape for name, parameter in Qwen2(config, device="meta").named_parameters()}
