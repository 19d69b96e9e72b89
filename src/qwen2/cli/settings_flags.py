"""The flags of a training job: one for each field of its frozen settings, with the field's type and help.

A flag that was not given is None, so that a resumed run keeps its own value and a job may choose by what else it was told.

    Flags = settings_flags(PretrainSettings, __name__)
"""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any, Optional, get_type_hints

from cyclopts import Parameter


def settings_flags(settings: type, module: str, unknown: tuple[str, ...] = ()) -> Any:
    """A frozen dataclass of optional flags. `unknown`: fields whose default says nothing, as it is found otherwise."""
    hints = get_type_hints(settings)
    flags = [_flag(f.name, f.default, f.metadata["help"], hints[f.name], f.name not in unknown) for f in fields(settings)]
    made = make_dataclass("Flags", flags, frozen=True)
    made.__module__ = module
    return made


def _flag(name: str, default: Any, text: str, hint: Any, known: bool) -> tuple[str, Any, Any]:
    of_list, switch = hint == tuple[str, ...], hint is bool
    shown = str(default).lower() if switch else str(default)
    parameter = Parameter(
        help=text, show_default=shown if switch or (known and default not in (0, (), None)) else False, negative=None if switch else ()
    )
    return name, Annotated[Optional[list[str] if of_list else hint], parameter], field(default=None)  # noqa: UP045


def given(flags: Any) -> dict[str, Any]:
    """The flags that were given, by name."""
    values = {f.name: getattr(flags, f.name) for f in fields(flags)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if value is not None}
