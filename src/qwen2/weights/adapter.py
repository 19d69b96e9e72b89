"""Adapters in PEFT's folder: adapter_config.json and adapter_model.safetensors, in and out.

Whatever would change the result and is not known is refused by name: a way of adapting that is not LoRA's, ranks by regular
expressions, layers saved whole, an initialisation that changes the base. Tensors are checked against the network before anything is
touched, so that an adapter of another model is one line.

What is left out: adapters of llama.cpp (GGUF), pickled ones, those of embeddings and of routed experts.

    load_adapter(network, Path("adapter"))                          # the network's layers are adapted
    save_adapter(network, settings, Path("adapter"), base="qwen2:0.5b")
"""

# I input width, O output width, r rank

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from qwen2.config.keys import Keys
from qwen2.model.linear import Linear
from qwen2.model.lora import TIED, Adapter, LoraSettings, adapted_layers, give, matching, targets_of
from qwen2.quant.linear import bands
from qwen2.weights.adapter_texts import save_texts
from qwen2.weights.checkpoint import FLOATS
from qwen2.weights.folders import OF_RUN
from qwen2.weights.json_object import read_json
from qwen2.weights.partial import file_digest
from qwen2.weights.safetensors_header import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

    from qwen2.config import GenerationDefaults
    from qwen2.model import Qwen2
    from qwen2.tokenizer import Tokenizer

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
TENSOR = re.compile(rf"{re.escape(PREFIX)}(?P<path>[\w.]+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
COPY = re.compile(rf"{re.escape(PREFIX)}[\w.]+\.base_layer\.weight")
PLAIN = re.compile(r"[\w.]+")
IGNORED = {  # what does not change what an adapter's numbers say
    "task_type": "what the model is for",
    "auto_mapping": "which classes of transformers",
    "peft_version": "who wrote it",
    "revision": "of the base on a hub",
    "inference_mode": "whether it is trained",
    "megatron_core": "another library's name",
    "qalora_group_size": "of use_qalora, which is looked at",
    "ensure_weight_tying": "of embeddings, whose tensors are refused",
    "layers_to_transform": "the tensors say it",
    "layers_pattern": "the tensors say it",
    "exclude_modules": "the tensors say it",
    "eva_config": "of first values",
}
STORED = 0.25  # two bits a weight are that far from what they stand for; two models are much further apart
UNCHANGED_BASE = (True, False, "gaussian", "eva", "orthogonal")  # first values under which the base stays as it was


@dataclass(frozen=True)
class AdapterFile:
    """A folder's content: settings, the base's name as it was written, scale and tensors by the adapted layer's path."""

    folder: Path
    settings: LoraSettings
    base: str | None
    scales: Mapping[str, float]
    tensors: Mapping[str, Mapping[str, Tensor]]  # lora_A (r, I), lora_B (O, r) and with DoRA lora_magnitude_vector (O,), float32
    copies: Mapping[str, Tensor]  # of the base's own weights, which PEFT writes beside the adapter of a head


def read_adapter(folder: Path) -> AdapterFile:
    """Read and check all but whether it fits a network. FileNotFoundError or ValueError in one line that says what is wrong and where."""
    keys = _config_keys(folder)
    settings, base, scale_of, rank_of = _settings(keys, folder / CONFIG)
    tensors, copies = _read_tensors(folder)
    for path, parts in tensors.items():
        wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if settings.dora else set())
        if parts.keys() != wanted:
            kind, name = ("has no", min(wanted - parts.keys())) if wanted - parts.keys() else ("has a", min(parts.keys() - wanted))
            why = "" if kind == "has no" else f", but use_dora is false in {CONFIG}"
            raise ValueError(f"{folder / WEIGHTS}: {path} {kind} {name}{why}")
        rank = rank_of(path)
        if len(parts["lora_A"]) != rank:
            raise ValueError(f"{folder / WEIGHTS}: {path}: lora_A has rank {len(parts['lora_A'])}, {CONFIG} says {rank}")
    scales = {path: scale_of(path) for path in tensors}
    return AdapterFile(folder, settings, base, scales, tensors, copies)


def _config_keys(folder: Path) -> Keys:
    path = folder / CONFIG
    if not path.exists():
        inside = folder / OF_RUN / CONFIG
        of_run = f"; {folder} is a run of adapters, and its adapter is {inside.parent}" if inside.exists() else ""
        raise FileNotFoundError(f"{path}: missing; an adapter's folder has it beside {WEIGHTS}{of_run}")
    fixed = {"bias": "none", "fan_in_fan_out": False, "peft_type": "LORA"}
    keys = Keys(read_json(path), str(path), IGNORED, fixed)
    first = keys.take("init_lora_weights", True)
    if not any(first is one or (isinstance(one, str) and first == one) for one in UNCHANGED_BASE):
        raise ValueError(
            f"{path}: init_lora_weights {first!r} changes the base's weights too: convert the adapter in PEFT when it is saved "
            "(path_initial_model_for_weight_conversion)"
        )
    return keys


def _settings(keys: Keys, path: Path) -> tuple[LoraSettings, str | None, Any, Any]:
    """The settings, the base, and functions from a layer's path to its scale and to its rank."""
    base = keys.text("base_model_name_or_path", None)
    targets = keys.take("target_modules", ())
    listed = isinstance(targets, list) and targets and all(isinstance(one, str) and one for one in targets)
    if not listed and not (isinstance(targets, str) and targets):
        raise keys.wrong("target_modules", targets, "a list of names or a string")
    alphas, ranks = (keys.part(name) for name in ("alpha_pattern", "rank_pattern"))
    for name in (*alphas, *ranks):
        if not PLAIN.fullmatch(name):
            raise ValueError(f"{path}: rank_pattern and alpha_pattern are read where they name layers; {name!r} is a regular expression")
    rank, alpha, dropout = keys.whole("r", 8), keys.real("lora_alpha", 8.0), keys.real("lora_dropout", 0.0)
    flags = {"rslora": keys.flag("use_rslora", False), "dora": keys.flag("use_dora", False)}
    keys.rest = {name: value for name, value in keys.rest.items() if value not in (False, "", 0) and value != {} and value != []}
    keys.end("not supported, and it may change what the adapter does: merge the adapter in PEFT and take the merged model")
    try:
        settings = LoraSettings(rank, alpha, dropout, tuple(targets) if listed else targets, **flags)
        for changes in (*({"rank": value} for value in ranks.values()), *({"alpha": value} for value in alphas.values())):
            replace(settings, **changes)  # which checks it
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None

    def rank_of(layer: str) -> int:
        return int(_by_name(ranks, layer, rank))

    def scale_of(layer: str) -> float:
        return replace(settings, rank=rank_of(layer), alpha=_by_name(alphas, layer, alpha)).scale

    return settings, base, scale_of, rank_of


def _by_name(values: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first name that the path is or ends in, as PEFT takes it."""
    return next((value for name, value in values.items() if path == name or path.endswith(f".{name}")), default)


def _read_tensors(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    path = folder / WEIGHTS
    if not path.exists():
        if (folder / PICKLED).exists():
            raise ValueError(f"{folder / PICKLED}: pickled weights are not read, they can run code: save the adapter anew as {WEIGHTS}")
        raise FileNotFoundError(f"{path}: missing; an adapter's folder has it beside {CONFIG}")
    found: dict[str, dict[str, Tensor]] = {}
    for name, extent in read_safetensors_header(path).items():
        match = TENSOR.fullmatch(name)
        if COPY.fullmatch(name):
            continue
        if match is None:
            what = "an embedding or a layer saved whole" if "lora_" not in name or "embedding" in name else "not a linear layer's A or B"
            raise ValueError(f"{path}: {name}: {what}; it would change the result and is not read: merge the adapter in PEFT")
        if extent.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is of type {extent.dtype}, not one of {', '.join(FLOATS)}")
        part = match["part"].removesuffix(".weight")
        if len(extent.shape) != (1 if part == "lora_magnitude_vector" else 2) or 0 in extent.shape:
            raise ValueError(f"{path}: {name} has shape {list(extent.shape)}: not what a linear layer's adapter has")
    copies: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        match = TENSOR.fullmatch(name)
        if match is None:
            copies[name.removeprefix(PREFIX).removesuffix(".base_layer.weight")] = tensor
            continue
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} has numbers that are not finite")
        found.setdefault(match["path"], {})[match["part"].removesuffix(".weight")] = tensor.float().contiguous()
    if not found:
        raise ValueError(f"{path}: has no tensors of an adapter")
    return found, copies


def targets_in(saved: AdapterFile) -> tuple[str, ...]:
    """The targets that adapted layers are: names of the file's list where these are all, else the layers' paths."""
    paths = tuple(saved.tensors)
    names = () if isinstance(saved.settings.targets, str) else saved.settings.targets
    of = {name: [path for path in paths if path == name or path.endswith(f".{name}")] for name in names}
    whole = set(paths) == {path for found in of.values() for path in found}
    return tuple(sorted(name for name in names if of[name])) if whole else paths


def digest_of(folder: Path) -> str:
    """Equal for adapters whose files are equal."""
    return hashlib.sha256("".join(file_digest(folder / name).hexdigest() for name in (CONFIG, WEIGHTS)).encode()).hexdigest()


def adapters_for(network: Qwen2, saved: AdapterFile) -> dict[str, Adapter]:
    """The adapters of a file for the layers of this network, by path.

    ValueError in one line where it was made for a model of another shape, or lacks a layer that its targets name.
    """
    there = {path for paths in targets_of(network).values() for path in paths}
    of = "" if saved.base is None else f" (of {saved.base})"
    other = f"the adapter{of} was made for another model"
    adapters: dict[str, Adapter] = {}
    for path, parts in saved.tensors.items():
        if path not in there:
            tied = network.config.tied and path in ("lm_head", "model.embed_tokens")
            raise ValueError(f"{saved.folder}: {path}: {TIED if tied else f'this model has no such layer; {other}'}")
        layer: Any = network.get_submodule(path)
        a, b, magnitude = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
        rank, inputs, outputs = len(a), layer.in_features, layer.out_features
        shapes = {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_magnitude_vector": (outputs,)}
        for name, tensor in parts.items():
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{saved.folder}: {path}: {name} is {list(tensor.shape)}, this model needs {list(shapes[name])}: {other}")
        copies = [None if part is None else part.clone().to(network.device) for part in (a, b, magnitude)]
        adapters[path] = Adapter(copies[0], copies[1], saved.scales[path], saved.settings.dropout, copies[2])  # type: ignore[arg-type]
    for path, copy in saved.copies.items():
        if path not in there or not _same(network.get_submodule(path), copy):
            raise ValueError(f"{saved.folder}: {path}: its base's own weights, which the file has too, are not this model's: {other}")
    _check_complete(network, saved, adapters)
    return adapters


def _same(layer: Any, copy: Tensor) -> bool:
    """Whether these are the weights of a layer, as near as two ways to store them may be."""
    start, apart, size = 0, 0.0, 0.0
    for band in [layer.weight.detach()] if isinstance(layer, Linear) else bands(layer.matrix):
        other = copy[start : start + len(band)].float()
        if other.shape != band.shape:
            return False
        apart, size, start = apart + float((band.float() - other).square().sum()), size + float(other.square().sum()), start + len(band)
    return start == len(copy) and apart <= STORED**2 * size


def _check_complete(network: Qwen2, saved: AdapterFile, adapters: Mapping[str, Adapter]) -> None:
    """Every layer whose name is a target, unless the config leaves layers out. Names that no layer has are those of other models.

    PEFT writes a list of targets as it was given, and loads it where one of them is there.
    """
    raw = read_json(saved.folder / CONFIG)
    if isinstance(saved.settings.targets, str) or raw.get("layers_to_transform") is not None or raw.get("exclude_modules"):
        return
    try:
        wanted = [path for name in saved.settings.names for path in matching(network, name)]
    except ValueError as error:
        raise ValueError(f"{saved.folder}: {CONFIG}: {error}") from None
    if not wanted:
        raise ValueError(f"{saved.folder}: {CONFIG} targets {', '.join(saved.settings.names)}: this model has no such layers")
    for path in wanted:
        if path not in adapters:
            raise ValueError(f"{saved.folder}: {CONFIG} targets {path}, and {WEIGHTS} has nothing of it: the adapter is incomplete")


def load_adapter(network: Qwen2, folder: Path) -> AdapterFile:
    """Put a folder's adapter on a network, plain or packed; everything else is frozen, the adapters want gradients."""
    saved = read_adapter(folder)
    adapters = adapters_for(network, saved)
    network.requires_grad_(False)
    give(network, adapters)
    return saved


def save_adapter(
    network: Qwen2,
    settings: LoraSettings,
    folder: Path,
    base: str | None,
    dtype: torch.dtype = torch.float32,
    texts: tuple[Tokenizer, GenerationDefaults] | None = None,
) -> None:
    """Write the network's adapters as a folder that PEFT loads; it appears whole or not at all, in the place of an earlier one.

    `base`: what the adapter belongs to, a store name or a path. `texts`: what it was trained with, kept beside it (adapter_texts.py).
    ValueError for a network without adapters, or for numbers that `dtype` cannot hold; OSError where the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for path, layer in adapted_layers(network):
        for name, parameter in layer.adapter.named_parameters():
            key = f"{PREFIX}{path}.{name}" + ("" if name == "lora_magnitude_vector" else ".weight")
            tensors[key] = parameter.detach().to("cpu", dtype).contiguous()
            if not bool(tensors[key].isfinite().all()):
                raise ValueError(f"{path}.{name} has numbers that are not finite: the adapter is not written")
    if not tensors:
        raise ValueError("this network has no adapters to write")
    values = _config(network, settings, base)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        text = json.dumps(values, indent=2) + "\n"
        (draft / CONFIG).write_text(text, encoding="utf-8")
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        if texts is not None:
            save_texts(draft, *texts)
        shutil.copymode(draft / CONFIG, draft / WEIGHTS)  # the library writes files that only their owner can read
        if (folder / CONFIG).exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _config(network: Qwen2, settings: LoraSettings, base: str | None) -> dict[str, Any]:
    """adapter_config.json: the keys that say something, in PEFT's words."""
    ranks, alphas = _patterns(network, settings)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": settings.rank, "lora_alpha": _short(settings.alpha), "lora_dropout": settings.dropout,
        "target_modules": sorted(names_of(network, {path for path, _ in adapted_layers(network)})),
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
        "use_rslora": settings.rslora, "use_dora": settings.dora, "rank_pattern": ranks, "alpha_pattern": alphas,
    }  # fmt: skip


def names_of(network: Qwen2, paths: Collection[str]) -> list[str]:
    """These layers as targets: the name where all layers of it are meant, else each one's path."""
    names: list[str] = []
    for leaf, every in targets_of(network).items():
        names += [leaf] if set(every) <= set(paths) else [path for path in every if path in paths]
    return names


def _patterns(network: Qwen2, settings: LoraSettings) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern: what layers have that is not the settings', under names as `names_of` writes them."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, layer in adapted_layers(network):
        rank = len(layer.adapter.lora_A)
        alpha = layer.adapter.scale * (math.sqrt(rank) if settings.rslora else rank)
        if rank != settings.rank:
            ranks[path] = rank
        if not math.isclose(alpha, settings.alpha, rel_tol=1e-9):
            alphas[path] = _short(float(f"{alpha:.12g}"))
    return _by_leaf(network, ranks), _by_leaf(network, alphas)


def _by_leaf(network: Qwen2, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by path, under a layer's name alone where all adapted layers of it have the same."""
    every: dict[str, list[str]] = {}
    for path, _ in adapted_layers(network):
        every.setdefault(path.rpartition(".")[2], []).append(path)
    found: dict[str, Any] = {}
    for leaf, paths in every.items():
        there = {values.get(path) for path in paths}
        alike = len(there) == 1 and None not in there
        found |= {leaf: there.pop()} if alike else {path.removeprefix("model."): values[path] for path in paths if path in values}
    return found


def _short(number: float) -> float:
    """A whole number without its point."""
    return int(number) if math.floor(number) == number else number
