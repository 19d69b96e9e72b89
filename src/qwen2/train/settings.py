"""What every training job can be told: the frozen settings of the loop, checked when they are made.

A job adds its own (pretrain.py). Each field's help is what `--help` says of its flag. What may differ when a run is resumed is in
changes.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from qwen2.train.changes import falling, rising


def setting(default: Any, text: str) -> Any:
    """A field with its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one run of the loop. Raises ValueError naming the field, its value and what it must be."""

    steps: int = setting(1000, "Optimizer steps of the whole run.")
    lr: float = setting(1e-3, "The peak learning rate.")
    schedule: Literal["wsd", "cosine", "constant"] = setting(
        "wsd", "How the rate goes on from its peak: wsd stays and falls at the end, cosine falls all the time."
    )
    warmup: float = setting(0.03, "The share of the steps in which the rate rises.")
    decay: float = setting(0.2, "The share of the steps in which it falls at the end (wsd).")
    final_lr: float = setting(0.0, "Where it ends, as a share of the peak.")
    beta1: float = setting(0.9, "AdamW: how much of the mean gradient stays at each step.")
    beta2: float = setting(0.95, "AdamW: how much of the mean square stays at each step.")
    eps: float = setting(1e-8, "AdamW: added to the root of the mean square.")
    weight_decay: float = setting(0.1, "Decoupled decay of matrices; norms, biases and the embedding have none.")
    clip: float = setting(1.0, "The largest norm of all gradients together; 0 is no limit.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "What products are computed in; weights stay float32. auto: bfloat16 where all processors of the run multiply it, else float32; "
        "a run that is resumed keeps it.",
    )
    recompute: Literal["none", "layers"] = setting(
        "none", "layers: keep only each layer's input and compute it again for the backward pass; a third slower, far less memory."
    )
    average: Literal["none", "ema", "tail"] = setting(
        "none", "A second set of weights, which is then the one that is evaluated and exported: ema, or the mean of the last steps."
    )
    ema_decay: float = setting(0.999, "How much of the exponential average stays at each step.")
    tail: float = setting(0.1, "The share of the steps at the end that the mean is taken over.")
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop", "What to do when a loss or a gradient is not finite: stop, or leave the batch out, say so and go on."
    )
    most_skips: int = setting(10, "Batches that may be left out one after another before the run stops all the same.")
    spike: float = setting(10.0, "A loss this many deviations above the recent median is called a spike; 0 looks for none.")
    on_spike: Literal["log", "rollback"] = setting(
        "log", "What to do at a spike: write it down, or go back to the last checkpoint and on with the batches behind it."
    )
    most_rollbacks: int = setting(3, "Times that a run may go back before it stops.")
    seed: int = setting(0, "Of the first weights and of the order of documents.")
    log_every: int = setting(10, "Steps between lines of metrics.")
    eval_every: int = setting(0, "Steps between evaluations; 0 evaluates at the start and the end only.")
    save_every: int = setting(200, "Steps between checkpoints; 0 keeps the last step's only.")
    keep: int = setting(2, "Checkpoints that are kept, the newest.")
    tensorboard: bool = setting(True, "Write events for TensorBoard too.")
    measure: bool = setting(True, "Measure at the start how fast this machine multiplies, which utilisation is a share of.")

    def __post_init__(self) -> None:
        for name in ("steps", "keep", "log_every", "most_skips", "most_rollbacks"):
            whole(name, getattr(self, name), 1)
        for name in ("eval_every", "save_every", "seed"):
            whole(name, getattr(self, name), 0)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr {self.lr}: the learning rate must be a number above 0; with {self.lr} nothing would be learned")
        for name in ("warmup", "decay", "final_lr", "tail"):
            number(name, getattr(self, name), 0, 1)
        for name in ("beta1", "beta2", "ema_decay"):
            number(name, getattr(self, name), 0, 1, below=True)
        for name in ("weight_decay", "clip", "spike"):
            number(name, getattr(self, name), 0, math.inf, below=True)
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise ValueError(f"eps {self.eps}: must be above 0")
        if self.precision == "float16":
            raise ValueError(
                "precision float16: Qwen2's large key biases overflow its range and small gradients vanish in it; take bfloat16 or float32"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}: must be one of {', '.join(choices)}")

    @property
    def warmup_steps(self) -> int:
        return rising({"warmup": self.warmup, "steps": self.steps})

    @property
    def decay_steps(self) -> int:
        return falling({"decay": self.decay, "steps": self.steps})

    @property
    def tail_steps(self) -> int:
        return max(1, round(self.tail * self.steps))


CHOICES = {
    "schedule": ("wsd", "cosine", "constant"),
    "precision": ("auto", "float32", "bfloat16"),
    "recompute": ("none", "layers"),
    "average": ("none", "ema", "tail"),
    "on_nonfinite": ("stop", "skip"),
    "on_spike": ("log", "rollback"),
}


def whole(name: str, value: Any, least: int) -> None:
    """ValueError unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} {value!r}: must be a whole number of at least {least}")


def number(name: str, value: Any, low: float, high: float, below: bool = False) -> None:
    """ValueError unless it is a number from `low` to `high`, or `below` it."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value and (value < high if below else value <= high)
    if not fits:
        raise ValueError(f"{name} {value!r}: must be a number from {low:g} {'to below' if below else 'to'} {high:g}")


def rows_at_once(asked: int | None, batch: int, most: int, what: str = "rows") -> int:
    """Rows of a step that are computed together: as asked, else `most`, or all where they are fewer. ValueError for more than all."""
    if asked is None:
        return min(most, batch)
    whole("micro_batch", asked, 1)
    if asked > batch:
        raise ValueError(f"micro_batch {asked}: a step has {batch} {what} in all (batch)")
    return asked


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as JSON has them."""
    return {f.name: getattr(settings, f.name) for f in fields(settings)}
