"""Ollama's PARAMETER names: which have an effect here, which are only ever off, and how a value is read from text or JSON.

Left out: what they do to a distribution, which `SamplingParams` says of the fields that they stand for.

    read_parameter("repeat_penalty", "1.1")         # 1.1
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from qwen2.config import GenerationDefaults

if TYPE_CHECKING:
    from collections.abc import Sequence

Value = float | int | bool | tuple[str, ...]
FIELDS: dict[str, tuple[str, type, str]] = {  # Ollama's name: ours, what a value is, its range
    "temperature": ("temperature", float, "from 0 (greedy) to 100"),
    "top_k": ("top_k", int, "0 (off) or a whole number above it"),
    "top_p": ("top_p", float, "above 0 and at most 1 (off)"),
    "min_p": ("min_p", float, "from 0 (off) to 1"),
    "repeat_penalty": ("repetition_penalty", float, "from 0.01 to 100; 1 is off"),
    "presence_penalty": ("presence_penalty", float, "from -2 to 2; 0 is off"),
    "frequency_penalty": ("frequency_penalty", float, "from -2 to 2; 0 is off"),
    "repeat_last_n": ("penalty_window", int, "a whole number of tokens, 0 (none) or -1 (all)"),
    "seed": ("seed", int, "a whole number of 64 bits"),
    "stop": ("stop", tuple, "a text of at least one character; several lines for several"),
    "num_predict": ("max_tokens", int, "a number of tokens, or -1 for as many as the window has room for"),
    "num_ctx": ("context", int, "a whole number of at least 1"),
}
OFF: dict[str, float | int | bool] = {  # transforms that there are not here, and the value with which they leave all as it is
    "penalize_newline": True,
    "tfs_z": 1.0,
    "typical_p": 1.0,
    "mirostat": 0,
}
MACHINE = {  # where and how it is computed, what is kept of a prompt that is cut, and the numbers of what is off: no effect on an answer
    **dict.fromkeys(("num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep"), int),
    **dict.fromkeys(("numa", "low_vram", "f16_kv", "use_mmap", "use_mlock"), bool),
    **dict.fromkeys(("mirostat_tau", "mirostat_eta"), float),
}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
WHOLE = re.compile(r"[+-]?\d{1,19}", re.ASCII)
SHOWN = 60


def read_parameter(name: str, value: object) -> Value:
    """A value of that parameter, checked; ValueError says what is wrong with name or value."""
    if name in FIELDS:
        ours, kind, rule = FIELDS[name]
        read = _stops(value) if kind is tuple else _number(name, value, kind, rule)
        if name != "num_predict" or read not in (-1, -2):
            try:
                GenerationDefaults(**{ours: read})  # type: ignore[arg-type]
            except ValueError:
                raise ValueError(f"{name} {_shown(value)}: must be {rule}") from None
        return read
    if name in OFF:
        read = _number(name, value, type(OFF[name]), "a number")
        if read != OFF[name]:
            raise ValueError(f"{name} {_shown(value)}: only {str(OFF[name]).lower()} is offered, which leaves everything as it is")
        return read
    if name in MACHINE:
        return _number(name, value, MACHINE[name], {int: "a whole number", bool: "true or false", float: "a number"}[MACHINE[name]])
    known = [*FIELDS, *OFF, *MACHINE]
    close = get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(FIELDS)}"
    raise ValueError(f"unknown parameter {_shown(name)}: {hint}")


def read_parameters(values: Mapping[str, object]) -> dict[str, Value]:
    """All of them. ValueError as for one, with the field's name in front."""
    found = {}
    for name, value in values.items():
        try:
            found[name] = read_parameter(name, value)
        except ValueError as error:
            raise ValueError(f"parameters: {error}") from None
    return found


def as_defaults(parameters: Mapping[str, Value], defaults: GenerationDefaults) -> GenerationDefaults:
    """A checkpoint's defaults with these in their place."""
    changes: dict[str, Any] = {FIELDS[name][0]: value for name, value in parameters.items() if name in FIELDS}
    if changes.get("max_tokens") in (-1, -2):
        changes["max_tokens"] = None
    return replace(defaults, **changes)


def shown_parameters(defaults: GenerationDefaults) -> dict[str, Value]:
    """What defaults say, under Ollama's names; what is off by itself and was not asked for is left out."""
    rest = GenerationDefaults()
    found: dict[str, Value] = {}
    for name, (ours, _, _) in FIELDS.items():
        value = getattr(defaults, ours)
        if value is not None and (ours in ("temperature", "top_k", "top_p", "repetition_penalty") or value != getattr(rest, ours)):
            found[name] = value
    return found


def _stops(value: object) -> tuple[str, ...]:
    texts: Sequence[object] = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop {_shown(value)}: must be {FIELDS['stop'][2]}")
    return tuple(str(text) for text in texts)


def _number(name: str, value: object, kind: type, rule: str) -> float | int | bool:
    if isinstance(value, str):
        if kind is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if kind is int and WHOLE.fullmatch(value):
            return int(value)
        if kind is float and NUMBER.fullmatch(value):
            return float(value)
    elif isinstance(value, bool) or kind is bool:
        if isinstance(value, bool) and kind is bool:
            return value
    elif isinstance(value, (int, float)) and (kind is float or value == int(value if abs(value) < 2**64 else 0)):
        return int(value) if kind is int else float(value) if abs(value) < 2**64 else float("inf")
    raise ValueError(f"{name} {_shown(value)}: must be {rule}")


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 200 else "of more than 60 digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
