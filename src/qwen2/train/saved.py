"""A model out of a run: the one of its end, or that of any checkpoint, also of a run that was stopped, killed or still goes on.

A checkpoint has the weights (the averaged ones where the run keeps such) and the config; the tokenizer is the run's own copy,
RUN/tokenizer, with the ids that end a text. Checkpoints of several ranks are read by one process. A run that trained adapters has
RUN/adapter at its end, and in its checkpoints their numbers alone: its model is the base, found where the run's config says that it
started, with the adapters merged into it. So is the model of any adapter's folder. What is left out: other sources of models, which
are `weights.model.load`'s.

    take("runs/short", print)                        # its end, else its newest whole checkpoint
    take("runs/short/checkpoints/step-000200", print)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwen2.config import GenerationDefaults, ModelConfig
from qwen2.model import Qwen2
from qwen2.model.lora import LoraSettings, add_lora, lora_parameters, merge
from qwen2.tokenizer import ChatTemplate, Tokenizer
from qwen2.train.checkpoint import STATE, checked, whole
from qwen2.train.folder import CONFIG, steps_done
from qwen2.train.place import ADAPTER, START, found_again, is_adapter, is_run
from qwen2.train.world import World
from qwen2.weights.adapter import load_adapter, read_adapter
from qwen2.weights.json_object import read_json
from qwen2.weights.model import Model, load
from qwen2.weights.store import Store

GENERATION = "generation_config.json"


def take(source: str | Path, say: Callable[[str], None], dtype: str = "auto") -> Model:
    """The model of a run's folder or a checkpoint's, in float32; anything else is loaded by `load`, in `dtype`, adapters merged.

    A damaged checkpoint of a run is passed over with a line. FileNotFoundError where there is none, or no tokenizer; ValueError where
    the checkpoint that is named is damaged.
    """
    path = Path(source)
    if is_adapter(path):
        return with_adapter(take_base(path, say, dtype), path)
    if not is_run(path):
        return load(source, dtype=dtype)
    while (found := kept_checkpoint(path, say)) is not None:
        try:
            return of_checkpoint(*found, say, dtype)
        except (ValueError, OSError):
            if found[0].exists():
                raise  # else the run goes on, and has removed it for newer ones
    if (path / "model").is_dir():
        return load(path / "model", dtype=dtype)
    return texts_of_run(with_adapter(take_base(path / ADAPTER, say, dtype), path / ADAPTER), path)


def kept_checkpoint(path: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that has a run's model, or is named itself, with its state; None where a run has ended. Errors as in `take`."""
    if (path / STATE).exists():
        try:
            return path, checked(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
    if ended(path):
        return None
    found = whole(path / "checkpoints", say)
    if found is None:
        raise FileNotFoundError(f"{path}: this run has neither a model nor a checkpoint yet; go on with it by --resume")
    say(f"{path}: this run has not ended; its model after step {found[1]['step']:,} is taken")
    return found


def ended(run: Path) -> bool:
    """Whether the model or the adapter that lies there is the run's last word, and no checkpoint of a later step."""
    there = (run / "model" / "config.json").exists() or is_adapter(run / ADAPTER)
    return there and (not (done := steps_done(run / "checkpoints")) or done >= read_json(run / "config.json")["settings"]["steps"])


def of_checkpoint(path: Path, state: dict[str, Any], say: Callable[[str], None], dtype: str) -> Model:
    """The model that a whole checkpoint holds, or that its adapters make of their base."""
    run, kind, record = run_of(path), "average" if state["averaged"] else "model", record_of(path)
    if of_adapters(path):
        model = take_base(run / ADAPTER, say, dtype)
        if record.get("from", {}).get("adapter") is not None:
            load_adapter(model.network, run / START)
        else:
            add_lora(model.network, LoraSettings(**{**record["lora"], "targets": _targets(record["lora"]["targets"])}))
        World().read(path, {f"{kind}/{name}": parameter for name, parameter in lora_parameters(model.network).items()})
        merge(model.network)
        return texts_of_run(replace(model, name=f"{run.name}-{path.name}", path=path), run)
    tokenizer, config = tokenizer_of(path), config_of(state)
    network = Qwen2(config, dtype=torch.float32, device="meta").to_empty(device="cpu").requires_grad_(False)
    World().read(path, {f"{kind}/{name}": parameter for name, parameter in network.named_parameters()})
    defaults = GenerationDefaults.from_hf(read_json(run / "tokenizer" / GENERATION))
    name = f"{run.name}-{path.name}"
    return Model(config, tokenizer, ChatTemplate.of(tokenizer), defaults, network.eval(), name, path, "float32")


def run_of(checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to."""
    return checkpoint.absolute().parent.parent


def record_of(checkpoint: Path) -> dict[str, Any]:
    """What the config of its run says; nothing where there is none."""
    path = run_of(checkpoint) / CONFIG
    return read_json(path) if path.exists() else {}


def of_adapters(checkpoint: Path) -> bool:
    """Whether a checkpoint has the numbers of adapters alone."""
    return record_of(checkpoint).get("lora") is not None


def config_of(state: dict[str, Any]) -> ModelConfig:
    """The config of a checkpoint's model."""
    return ModelConfig.from_hf(state["model"])


def tokenizer_of(checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's run. FileNotFoundError where it has none."""
    folder = run_of(checkpoint) / "tokenizer"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not there, and a checkpoint has no tokenizer of its own; --resume of the run writes it")
    return Tokenizer.from_folder(folder)


def base_of(folder: Path, way: str) -> str:
    """What an adapter's folder belongs to: as its run's config says, which knows where the base lies now, else as it says itself.

    ValueError where none is named; `way` is how the user names one.
    """
    run = folder.absolute().parent
    record = read_json(run / CONFIG).get("from") if is_run(run) else None
    base = found_again(record, run) if record is not None else read_adapter(folder).base
    if base is None:
        raise ValueError(f"{folder}: does not say which model it belongs to; {way}")
    if Path(base).resolve() in (folder.resolve(), run):
        raise ValueError(f"{folder}: names itself as the model that it belongs to; {way}")
    return base


def take_base(folder: Path, say: Callable[[str], None], dtype: str) -> Model:
    """The model that an adapter's folder belongs to.

    ValueError or FileNotFoundError where none is named, or what is named cannot be loaded.
    """
    way = f"name it: qwen2 export BASE DESTINATION --adapter {folder}"
    base = base_of(folder, way)
    try:
        return take(base, say, dtype)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{folder}: the model that it belongs to: {error}; if it is elsewhere, {way}") from None


def files_of(source: str | Path) -> str | None:
    """What `load` takes for a source: itself, or the model of a run that has ended; None for adapters, checkpoints, and runs before."""
    path = Path(source)
    if is_run(path):
        return str(path / "model") if ended(path) and (path / "model" / "config.json").exists() else None
    return None if is_adapter(path) else str(source)


def unmerged(source: str | Path, say: Callable[[str], None]) -> tuple[str, Path] | None:
    """What `load` takes for the base of an adapter, or of a run of adapters that has ended, and the adapter's folder.

    None where there is no adapter; and where it can only be merged, which is said with the reason: before a run's end, and over a base
    that has an adapter itself or is a checkpoint. ValueError or FileNotFoundError where the base is not named or not there.
    """
    path = Path(source)
    if (path / STATE).exists() or not (is_run(path) or is_adapter(path)):
        return None
    folder = path if is_adapter(path) else path / ADAPTER
    if not is_adapter(folder) or (folder != path and not ended(path)) or files_of(path) is not None:
        return None
    way = f"name it: BASE --adapter {folder}"
    base = base_of(folder, way)
    files, store = files_of(base), Store()
    try:
        own = files is not None and not store.is_path(files) and store.get(files).adapter_path is not None
        if files is not None:
            store.resolve(files)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{folder}: the model that it belongs to: {error}; if it is elsewhere, {way}") from None
    if files is None or own:
        say(
            f"{folder}: the model that it belongs to, {base}, {'has an adapter itself' if own else 'is an adapter or a checkpoint'}: merged"
        )
        return None
    return files, folder


def with_adapter(model: Model, folder: Path) -> Model:
    """The same model with an adapter merged into its weights, and what its folder says of chats; its old weights are gone."""
    load_adapter(model.network, folder)
    merge(model.network)
    spoken = model.with_adapter(folder)
    return replace(spoken, name=f"{model.name}-{folder.name}", path=folder, adapter=None, files=None)


def texts_of_run(model: Model, run: Path) -> Model:
    """The model with what its run keeps of its own: tokenizer, template, and the ids that end a text."""
    if not (run / "tokenizer").is_dir():
        return model
    tokenizer = Tokenizer.from_folder(run / "tokenizer")
    defaults = GenerationDefaults.from_hf(read_json(run / "tokenizer" / GENERATION))
    config = replace(model.config, eos=ModelConfig.from_hf(read_json(run / CONFIG)["model"]).eos)
    template = ChatTemplate.of(tokenizer)
    return replace(model, config=config, tokenizer=tokenizer, template=template, generation=defaults, name=run.name, files=None)


def _targets(written: Any) -> str | tuple[str, ...]:
    """As JSON has them, back."""
    return written if isinstance(written, str) else tuple(written)
