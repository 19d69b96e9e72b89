"""The adapters that a run trains: new ones, or that of a folder, with which training goes on over the same base.

What a run goes on with is the model's own adapter (`Model.adapter`), which its network is free of until here. The run keeps a copy,
RUN/start-adapter, since the folder may be gone or overwritten when it is resumed; its checkpoints have the numbers alone.

    model = adapted(start, settings, seed=0)                # the network's adapters want gradients, everything else is frozen
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwen2.model.lora import adapted_layers, add_lora
from qwen2.model.packed import PackedEmbedding, PackedExperts
from qwen2.quant.linear import PackedLinear, bands
from qwen2.train.folder import CONFIG as RUN_CONFIG
from qwen2.train.place import START
from qwen2.weights.adapter import CONFIG, WEIGHTS, load_adapter, read_adapter, targets_in
from qwen2.weights.adapter_texts import TEXTS
from qwen2.weights.json_object import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.config.lora import LoraSettings
    from qwen2.model import Qwen2
    from qwen2.weights.model import Model

ROWS = 4096  # of an embedding at a time


def settings_of(folder: Path) -> LoraSettings:
    """How the adapter of a folder adapts; the targets that its layers are. Errors as `read_adapter`."""
    saved = read_adapter(folder)
    return replace(saved.settings, targets=targets_in(saved))


def check_same(settings: LoraSettings, folder: Path) -> None:
    """ValueError where settings are not those of the adapter that training goes on with; dropout may be another."""
    own = settings_of(folder)
    for name in ("rank", "alpha", "rslora", "dora"):
        ours, theirs = getattr(settings, name), getattr(own, name)
        if ours != theirs:
            raise ValueError(f"{name} {ours}: training goes on with {folder}, whose {name} is {theirs}; leave it out")
    if set(settings.names) != set(own.names):
        raise ValueError(
            f"targets {','.join(settings.names)}: training goes on with {folder}, whose are {','.join(own.names)}; leave it out"
        )


def adapted(model: Model, settings: LoraSettings, seed: int) -> Model:
    """The model with adapters on its network that want gradients: its own, which is none beside it any more, or new ones.

    ValueError for targets that no layer is, or for settings that are not its own adapter's.
    """
    if model.adapter is None:
        add_lora(model.network, settings, torch.Generator().manual_seed(seed))
        return model
    check_same(settings, model.adapter)
    load_adapter(model.network, model.adapter)
    for _, layer in adapted_layers(model.network):
        layer.adapter.dropout = settings.dropout
    return replace(model, adapter=None)


def keep_start(folder: Path | None, run: Path) -> None:
    """The run's own copy of the adapter that it goes on with, if it does."""
    if folder is None or (run / START).exists():
        return
    draft = run / f".{START}.{os.getpid()}.part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for name in (CONFIG, WEIGHTS, *(name for name in TEXTS if (folder / name).exists())):
        shutil.copyfile(folder / name, draft / name)
    draft.rename(run / START)


def check_device(model: Model, device: torch.device) -> None:
    """ValueError where weights are in blocks and the device is not the CPU, whose kernels alone unpack them."""
    if model.network.packed and device.type != "cpu":
        raise ValueError(f"{model.name}: weights in blocks are unpacked on the CPU alone, not on {device}; leave --qlora or --device out")


def check_weights(model: Model, resumed: Path | None) -> None:
    """ValueError where the weights themselves cannot be trained, or the run that is resumed is one of adapters."""
    if model.adapter is not None:
        raise ValueError(f"{model.name} has an adapter beside its weights: train that, or merge it first")
    if model.network.packed:
        raise ValueError("weights in blocks cannot be trained themselves: train adapters, --lora-rank N, or load the model in float32")
    if resumed is not None and (resumed / RUN_CONFIG).exists() and "lora" in read_json(resumed / RUN_CONFIG):
        raise ValueError(f"{resumed}: this run trains adapters; give --lora-rank and what else it was started with")


def weights_sha256(network: Qwen2) -> str:
    """Of all weights as float32, with their names and shapes; packed ones are unpacked some rows at a time."""
    digest = hashlib.sha256()
    for name, shape, pieces in _pieces(network):
        digest.update(f"{name} {list(shape)}".encode())
        for piece in pieces:
            digest.update(piece.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _pieces(network: Qwen2) -> Iterator[tuple[str, tuple[int, ...], Iterable[Tensor]]]:
    """What `Qwen2.tensors` has, in its order: names, shapes, and the numbers in pieces. The network has no adapters."""
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{name}", tuple(parameter.shape), [parameter]
        if isinstance(module, PackedLinear):
            yield f"{path}.weight", module.matrix.shape, bands(module.matrix)
        elif isinstance(module, PackedEmbedding):
            rows = torch.arange(module.shape[0]).split(ROWS)
            yield f"{path}.weight", module.shape, map(module, rows)
        elif isinstance(module, PackedExperts):
            yield from ((f"{path}.{name}", tuple(whole.shape), [whole]) for name, whole in module.unpack())
