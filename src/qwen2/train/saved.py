"""A model out of a run: the one of its end, or that of any checkpoint, also of a run that was stopped, killed or still goes on.

A checkpoint has the weights (the averaged ones where the run keeps such) and the config; the tokenizer is the run's own copy,
RUN/tokenizer, with the ids that end a text. Checkpoints of several ranks are read by one process. What is left out: other sources of
models, which are `weights.model.load`'s.

    take("runs/short", print)                        # its end, else its newest whole checkpoint
    take("runs/short/checkpoints/step-000200", print)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qwen2.config import GenerationDefaults, ModelConfig
from qwen2.model import Qwen2
from qwen2.tokenizer import ChatTemplate, Tokenizer
from qwen2.train.checkpoint import STATE, checked, whole
from qwen2.train.folder import steps_done
from qwen2.train.place import is_run
from qwen2.train.world import World
from qwen2.weights.json_object import read_json
from qwen2.weights.model import Model, load

GENERATION = "generation_config.json"


def take(source: str | Path, say: Callable[[str], None], dtype: str = "auto") -> Model:
    """The model of a run's folder or a checkpoint's, in float32; anything else is loaded by `load`, in `dtype`.

    A damaged checkpoint of a run is passed over with a line. FileNotFoundError where there is none, or no tokenizer; ValueError where
    the checkpoint that is named is damaged.
    """
    path = Path(source)
    if not is_run(path):
        return load(source, dtype=dtype)
    if (path / STATE).exists():
        try:
            state = checked(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
        return of_checkpoint(path, state)
    if ended(path):
        return load(path / "model", dtype=dtype)
    while True:
        found = whole(path / "checkpoints", say)
        if found is None:
            raise FileNotFoundError(f"{path}: this run has neither a model nor a checkpoint yet; go on with it by --resume")
        try:
            model = of_checkpoint(*found)
        except (ValueError, OSError):
            if found[0].exists():
                raise
            continue  # the run goes on, and has removed it for newer ones
        say(f"{path}: this run has not ended; its model after step {found[1]['step']:,} is taken")
        return model


def ended(run: Path) -> bool:
    """Whether the model that lies there is the run's last word, and no checkpoint of a later step."""
    model = run / "model" / "config.json"
    return model.exists() and (not (done := steps_done(run / "checkpoints")) or done >= read_json(run / "config.json")["settings"]["steps"])


def of_checkpoint(path: Path, state: dict[str, Any]) -> Model:
    """The model that a whole checkpoint holds."""
    run = path.absolute().parent.parent
    if not (run / "tokenizer").is_dir():
        raise FileNotFoundError(
            f"{run / 'tokenizer'}: not there, and a checkpoint has no tokenizer of its own; --resume of the run writes it"
        )
    tokenizer, config = Tokenizer.from_folder(run / "tokenizer"), ModelConfig.from_hf(state["model"])
    network = Qwen2(config, dtype=torch.float32, device="meta").to_empty(device="cpu").requires_grad_(False)
    kind = "average" if state["averaged"] else "model"
    World().read(path, {f"{kind}/{name}": parameter for name, parameter in network.named_parameters()})
    defaults = GenerationDefaults.from_hf(read_json(run / "tokenizer" / GENERATION))
    name = f"{run.name}-{path.name}"
    return Model(config, tokenizer, ChatTemplate.of(tokenizer), defaults, network.eval(), name, path, "float32")
