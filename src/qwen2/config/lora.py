"""How a model is adapted by low-rank matrices: the settings that are written down, checked when they are made.

Knows no torch. What is left out: the adapters themselves (model/lora.py) and PEFT's words for these (weights/adapter.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GROUPS = ("all-linear", "attention")


@dataclass(frozen=True)
class LoraSettings:
    """How a network is adapted. `targets`: all-linear, attention, or names of layers. Raises ValueError naming the field and its value."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank {self.rank!r}: must be a whole number of at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha {self.alpha!r}: must be a number above 0; with {self.alpha!r} the adapter would change nothing")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout!r}: must be a number from 0 to below 1")
        if not self.targets or (isinstance(self.targets, tuple) and not all(self.targets)):
            raise ValueError(f"targets {self.targets!r}: must be {', '.join(GROUPS)} or names of layers, such as q_proj,v_proj")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank

    @property
    def names(self) -> tuple[str, ...]:
        """The targets, one by one; a text may hold several, with commas between."""
        return tuple(name.strip() for name in self.targets.split(",")) if isinstance(self.targets, str) else tuple(self.targets)
