"""A JSON object read strictly: each key is taken once, with its type checked, and what is left at the end is an error.

Used for config.json and generation_config.json; GGUF metadata has its own reader (`gguf.py`), whose values are typed already.
What is left out: any default that the file's format does not define.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING: Any = object()
LARGEST = 2**53  # beyond it a JSON number is no longer exact everywhere


class Keys:
    """The keys of one object of `file`; null is "not set". `ignored` keys are dropped, `fixed` ones must hold a harmless value."""

    def __init__(
        self, values: Mapping[str, Any], file: str, ignored: Mapping[str, str] | None = None, fixed: Mapping[str, Any] | None = None
    ) -> None:
        self.file = file
        self.rest = {key: value for key, value in values.items() if value is not None and key not in (ignored or {})}
        for key, allowed in (fixed or {}).items():
            value = self.rest.pop(key, allowed)
            if type(value) not in (type(allowed), int, float) or value != allowed:
                raise ValueError(f"{file}: {key} {short(value)} is not supported, only {allowed!r}")

    def whole(self, key: str, default: int | None = MISSING) -> Any:
        value = self.take(key, default)
        if value is default or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST):
            return value
        raise self.wrong(key, value, "a whole number")

    def real(self, key: str, default: float | None = MISSING) -> Any:
        value = self.take(key, default)
        if value is default:
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and not math.isnan(value):
            return float(value)
        raise self.wrong(key, value, "a finite number")

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if isinstance(value, bool):
            return value
        raise self.wrong(key, value, "true or false")

    def text(self, key: str, default: str | None = MISSING) -> Any:
        value = self.take(key, default)
        if value is default or isinstance(value, str):
            return value
        raise self.wrong(key, value, "a string")

    def ids(self, key: str) -> tuple[int, ...]:
        """A whole number or a list of them; none where the key is not there."""
        value = self.take(key, [])
        listed = value if isinstance(value, list | tuple) else [value]
        if all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < LARGEST for item in listed):
            return tuple(listed)
        raise self.wrong(key, value, "a whole number or a list of them")

    def part(self, key: str) -> dict[str, Any]:
        """An object inside; empty where the key is not there."""
        value = self.take(key, {})
        if isinstance(value, Mapping):
            return dict(value)
        raise self.wrong(key, value, "an object")

    def take(self, key: str, default: Any = MISSING) -> Any:
        if key not in self.rest and default is MISSING:
            raise ValueError(f"{self.file}: {key} missing")
        return self.rest.pop(key, default)

    def wrong(self, key: str, value: object, wanted: str) -> ValueError:
        return ValueError(f"{self.file}: {key} is {short(value)}, must be {wanted}")

    def end(self, why: str) -> None:
        """Nothing may be left; `why` is what is wrong with a key that is."""
        if self.rest:
            raise ValueError(f"{self.file}: {', '.join(sorted(self.rest)[:3])}: {why}")


def short(value: object) -> str:
    """A value as it is written, cut where it is long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < LARGEST else f"{str(value)[:20]}..."
    return text if len(text) <= 60 else text[:57] + "..."
