"""The sampling defaults that a GGUF file's metadata states, in and out. Imports no torch, so that `qwen2 show` answers at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen2.config import GenerationDefaults, published_generation
from qwen2.config.keys import short

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qwen2.config import ModelConfig

SAMPLING = {  # llama.cpp's keys, ours, and what the value is
    "general.sampling.temp": ("temperature", float),
    "general.sampling.top_k": ("top_k", int),
    "general.sampling.top_p": ("top_p", float),
    "general.sampling.min_p": ("min_p", float),
    "general.sampling.penalty_repeat": ("repetition_penalty", float),
    "general.sampling.penalty_last_n": ("penalty_window", int),
}


def generation_from_gguf(metadata: Mapping[str, object], config: ModelConfig, eos: tuple[int, ...]) -> GenerationDefaults:
    """Sampling defaults: what the file states, else what was published with the released model of this shape, else greedy.

    `eos` are the tokenizer's end tokens. GGUF conversions of Qwen2 leave generation_config.json behind; the shape tells which one it was.
    """
    unknown = [key for key in metadata if key.startswith("general.sampling.") and key not in SAMPLING]
    if unknown:
        raise ValueError(f"GGUF key {unknown[0]}: this way of sampling is not supported; remove the key to load the file without it")
    stated: dict[str, Any] = {}
    for key, (ours, kind) in SAMPLING.items():
        if key in metadata:
            try:
                stated[ours] = kind(metadata[key])
                GenerationDefaults(**{ours: stated[ours]})
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"GGUF key {key} is {short(metadata[key])}: out of range") from None
    if stated:
        return GenerationDefaults(eos=eos, **stated)
    published = published_generation(config) if metadata.get("general.architecture") != "llama" else None
    return GenerationDefaults(eos=eos) if published is None else published


def sampling_to_gguf(generation: GenerationDefaults) -> dict[str, float | int]:
    """The metadata that reads back as these defaults."""
    values = {key: kind(getattr(generation, ours)) for key, (ours, kind) in SAMPLING.items()}
    if generation.penalty_window == GenerationDefaults.penalty_window:  # said only where it is asked for
        del values["general.sampling.penalty_last_n"]
    return values
