"""What a job can know of the model that it starts from before any weight is read: config, chat template, generation defaults.

A store name, a file, a folder, a run or a checkpoint of one. What is left out: the weights (weights/model.py, train/saved.py).

    read_start("qwen2.5-coder:0.5b").template.render(messages)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen2.config import GenerationDefaults, ModelConfig
from qwen2.tokenizer import ChatTemplate, Tokenizer
from qwen2.train.place import is_adapter, is_run
from qwen2.train.saved import GENERATION
from qwen2.weights.adapter_texts import with_texts
from qwen2.weights.json_object import read_json
from qwen2.weights.model import open_files
from qwen2.weights.modelfile import UNCHANGED
from qwen2.weights.store import Store


@dataclass(frozen=True)
class Start:
    """A model without its weights."""

    config: ModelConfig
    template: ChatTemplate
    generation: GenerationDefaults


def read_start(source: str | Path, adapter: Path | None = None) -> Start:
    """Read it from headers, with what an adapter's folder says of chats where training goes on with that.

    ValueError or FileNotFoundError in one line that says what is wrong and where.
    """
    path = Path(source)
    if is_adapter(path):
        raise ValueError(
            f"{path}: an adapter's folder: name the model that it is for, and go on training it with --adapter {path}, "
            f"or make it a model first: qwen2 export {path} FOLDER"
        )
    if is_run(path):
        start = _of_run(path.absolute() if (path / "config.json").exists() else path.absolute().parent.parent)
        return start if adapter is None else _under(adapter, start)
    store = Store()
    place, _ = store.resolve(source)
    stored = None if store.is_path(source) else store.get(str(source))
    made, own = (UNCHANGED, None) if stored is None else (stored.made, stored.adapter_path)
    with open_files(place) as opened:
        files = with_texts(own, opened.config, opened.tokenizer, opened.generation)
        config, tokenizer, generation = with_texts(adapter, *files)
        return Start(config, ChatTemplate.of(tokenizer, source=made.template), made.defaults(generation))


def _under(adapter: Path, start: Start) -> Start:
    config, tokenizer, generation = with_texts(adapter, start.config, start.template.tokenizer, start.generation)
    return Start(config, ChatTemplate.of(tokenizer), generation)


def _of_run(run: Path) -> Start:
    """A run keeps its texts from the start."""
    if not (run / "tokenizer").is_dir():
        raise FileNotFoundError(f"{run / 'tokenizer'}: not there; --resume of the run writes it")
    config = ModelConfig.from_hf(read_json(run / "config.json")["model"])
    tokenizer = Tokenizer.from_folder(run / "tokenizer")
    return Start(config, ChatTemplate.of(tokenizer), GenerationDefaults.from_hf(read_json(run / "tokenizer" / GENERATION)))
