"""Settings of rejection sampling; the flags of `qwen2 synth reject` are made of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen2.engine.request import MOST_SAMPLES
from qwen2.post.synth.pick import Order, Rule


@dataclass(frozen=True)
class RejectSettings:
    """How much is sampled, and what becomes of it. Raises ValueError for what cannot be."""

    k: int = field(default=16, metadata={"help": "Answers to each prompt."})
    seed: int = field(default=0, metadata={"help": "The same seed gives the same rows."})
    per_prompt: int = field(default=4, metadata={"help": "Right answers of a prompt that become SFT rows, at most."})
    pick: Order = field(default="spread", metadata={"help": "spread: the shortest, then what differs most; shortest: by length."})
    least_distance: float = field(default=0.0, metadata={"help": "From 0 to 1: how far apart rows of a prompt must be."})
    pairs_per_prompt: int = field(default=1, metadata={"help": "Preference pairs of a prompt, at most."})
    rejected: Rule = field(
        default="length", metadata={"help": "The wrong one of a pair: length, the nearest in length; frequent, the commonest result."}
    )
    workers: int = field(default=2, metadata={"help": "Answers that are checked at a time."})

    def __post_init__(self) -> None:
        for name, least, most in (("k", 1, MOST_SAMPLES), ("per_prompt", 0, None), ("pairs_per_prompt", 0, None), ("workers", 1, 256)):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                raise ValueError(f"{name} {value}: must be {f'from {least} to {most}' if most else f'at least {least}'}")
        if not 0 <= self.least_distance <= 1:
            raise ValueError(f"least_distance {self.least_distance:g}: must be from 0 to 1")
