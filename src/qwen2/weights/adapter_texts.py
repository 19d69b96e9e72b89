"""What an adapter's folder says beside its numbers: the chat template that it was trained with, what ends a text, sampling defaults.

Tools that train adapters leave the tokenizer's files beside them, and ours generation_config.json too. A base model with such an adapter
is a chat model whose turns end, as is what comes of merging it. Tokens are named by their texts, and stay the base's.

What is left out: vocabularies that an adapter has enlarged, whose embeddings are refused (adapter.py).

    config, tokenizer, generation = with_texts(Path("adapter"), config, tokenizer, generation)
"""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2.config import GenerationDefaults
from qwen2.tokenizer.load import chat_template_of
from qwen2.weights.json_object import read_json

if TYPE_CHECKING:
    from qwen2.config import ModelConfig
    from qwen2.tokenizer import Tokenizer

GENERATION, TOKENIZER, TEMPLATE = "generation_config.json", "tokenizer_config.json", "chat_template.jinja"
TEXTS = (GENERATION, TOKENIZER, TEMPLATE)  # what is read
BESIDE = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")  # what is there for others


def save_texts(folder: Path, tokenizer: Tokenizer, generation: GenerationDefaults) -> None:
    """Write the tokenizer's files, with its chat template, and generation_config.json."""
    tokenizer.save(folder)
    (folder / GENERATION).write_text(json.dumps(generation.to_hf(), indent=2) + "\n", encoding="utf-8")


def has_texts(folder: Path) -> bool:
    """Whether there is any of what is read."""
    return any((folder / name).exists() for name in TEXTS)


def with_texts(
    folder: Path | None, config: ModelConfig, tokenizer: Tokenizer, generation: GenerationDefaults
) -> tuple[ModelConfig, Tokenizer, GenerationDefaults]:
    """A base's config, tokenizer and defaults as they are under the adapter of a folder, whose own go before.

    What the folder does not say stays; all of it where `folder` is None. ValueError in one line that names the file that is wrong.
    """
    if folder is None or not has_texts(folder):
        return config, tokenizer, generation
    values: dict[str, Any] = read_json(folder / TOKENIZER) if (folder / TOKENIZER).exists() else {}
    template = chat_template_of(values, folder)
    end = _named(values.get("eos_token"), tokenizer)
    own = _defaults(folder / GENERATION, config.vocab)
    if template is None and end is None and own is None:
        return config, tokenizer, generation
    ends = generation.eos if end is None else _first(end, generation.eos)
    if own is not None:
        ends, generation = own.eos or ends, own
    tokenizer = copy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template if template is None else template
    tokenizer.eos = tuple(dict.fromkeys((*(() if end is None else (end,)), *ends, *tokenizer.eos)))
    return replace(config, eos=ends[:1] or config.eos), tokenizer, replace(generation, eos=ends)


def _first(end: int, others: tuple[int, ...]) -> tuple[int, ...]:
    """These ends as they are where it is one of them, else behind it."""
    return others if end in others else (end, *others)


def _named(value: object, tokenizer: Tokenizer) -> int | None:
    """The token of the base that a tokenizer's config names; None where it names none, or one that the base does not have."""
    text = value.get("content") if isinstance(value, dict) else value
    return tokenizer.control.get(text) if isinstance(text, str) else None


def _defaults(path: Path, vocab: int) -> GenerationDefaults | None:
    if not path.exists():
        return None
    try:
        found = GenerationDefaults.from_hf(read_json(path))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    for end in found.eos:
        if not 0 <= end < vocab:
            raise ValueError(f"{path}: the end token {end} is beyond the embedding's {vocab} rows")
    return found
