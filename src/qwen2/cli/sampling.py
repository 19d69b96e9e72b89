"""Sampling parameters as people write them: flags of `qwen2 run`, and `/set parameter` in a conversation.

Both are derived from the fields of `SamplingParams`: names, types, defaults, and what each says of itself as its help. Left out:
`n`, the log-probabilities and `context`, which one conversation has no place for; Python and the servers have them. A `constraint` is
`--format` and `/set format`.

    read_value("top_p", "0.9")      # 0.9
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Optional, Union, get_args, get_origin, get_type_hints

from cyclopts import Parameter

from qwen2.cli.app import BIAS_FORM
from qwen2.engine.constraint import Constraint
from qwen2.engine.request import SamplingParams

LEFT_OUT = ("n", "logprobs", "prompt_logprobs", "constraint", "context")
KINDS = {float: "a number", int: "a whole number", bool: "on or off"}
UNIONS = (Union, UnionType)
SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


def _plain(hint: Any) -> Any:
    """The type that one value of a field is read as: float, int, bool, list[str], list[int] or dict[str, float]."""
    inner = [part for part in get_args(hint) if part is not type(None)]
    kind = inner[0] if len(inner) == 1 else hint
    if kind in (float, int, bool):
        return kind if kind is hint or get_origin(hint) in UNIONS else list[kind]  # type: ignore[valid-type]
    return dict[str, float] if get_origin(hint) is Mapping else list[str]


HELP = {f.name: str(f.metadata["help"]) for f in fields(SamplingParams)}
HELP["logit_bias"] += f" Written {BIAS_FORM}, once for each token."
KIND = {name: _plain(hint) for name, hint in get_type_hints(SamplingParams).items() if name not in LEFT_OUT}


def _flag(name: str, text: str) -> tuple[str, Any, Any]:
    return name, Annotated[Optional[KIND[name]], Parameter(help=text, negative=(), show_default=False)], field(default=None)  # noqa: UP045


def make_flags(title: str, texts: Mapping[str, str], module: str) -> Any:
    """Flags for those parameters that `texts` says something of."""
    made = make_dataclass(title, [_flag(name, texts[name]) for name in KIND if name in texts], frozen=True)
    made.__module__ = module
    return made


if TYPE_CHECKING:
    Flags = SamplingParams
else:  # an optional field per parameter; None where the flag was not given
    Flags = make_flags("Flags", HELP, __name__)


def params_of(flags: Flags) -> SamplingParams:
    """The flags that were given, checked."""
    given = {f.name: getattr(flags, f.name) for f in fields(flags) if getattr(flags, f.name) is not None}
    if "logit_bias" in given:
        given["logit_bias"] = _biases(given["logit_bias"])
    return SamplingParams.from_dict(given)


def change(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """The parameters with one of them set from text; "default" gives it back to the model."""
    name = name.replace("-", "_")
    if name not in KIND:
        raise ValueError(f"parameter {name!r}: unknown; there are {', '.join(KIND)}")
    value = getattr(SamplingParams(), name) if text == "default" else read_value(name, text)
    return replace(params, **{name: value})


def read_form(text: str | None) -> Constraint | None:
    """The form of answers: "json" for any JSON object, or a file with a JSON schema; "default" or nothing is free text."""
    if text is None or text == "default":
        return None
    if text == "json":
        return Constraint.json_object()
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(f"format {text!r}: must be json, or a file with a JSON schema")
    try:
        return Constraint.json_schema(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"format {path}: {error}") from None


def read_value(name: str, text: str) -> Any:
    """A value for the parameter of that name, of the right type; its range is checked by `SamplingParams`."""
    kind = KIND[name]
    try:
        if kind is bool:
            return SWITCH[text.lower()]
        if kind in (int, float):
            return kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name} {text!r}: must be {KINDS[kind]}") from None
    if kind == dict[str, float]:
        return _biases(_json(name, text, dict, 'token ids and numbers as {"9707": -5}'))
    if text.startswith("["):
        return _json(name, text, list, "a list")
    try:
        words = shlex.split(text)
        return [int(word) for word in words] if kind == list[int] else words
    except ValueError as error:
        raise ValueError(f"{name} {text!r}: {error}; write texts with spaces in quotes, ids as numbers") from None


def _json(name: str, text: str, kind: type, wanted: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise ValueError(f"{name} {text!r}: must be {wanted}")
    return value


def _biases(values: dict[str, float]) -> dict[int, float]:
    for token in values:
        if not token.isdecimal():
            raise ValueError(f"logit_bias for token {token!r}: must be given by token id, a whole number of at least 0")
    return {int(token): bias for token, bias in values.items()}
