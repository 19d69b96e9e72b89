"""The settings of preference training: those of the loop, and what concerns pairs and losses. Knows no torch.

The Qwen2 report trains DPO on pairs made beforehand and publishes no numbers; the defaults of beta (0.1), rate (1e-6) and schedule
(cosine) are those of the authors' Online Merging example (arXiv 2405.17931). A setting that the chosen loss has no use for is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from qwen2.train.settings import Settings, number, rows_at_once, setting, whole

AT_ONCE = 2  # pairs, where nothing is said
LORA_LR = 2e-5  # the peak rate of adapters, which want more than the weights themselves
LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")
OF = {  # settings that some losses alone have
    "length_normalised": ("dpo",),
    "label_smoothing": ("dpo", "simpo"),
    "margin": ("simpo",),
    "desirable": ("kto",),
    "undesirable": ("kto",),
    "sft": ("dpo", "ipo", "simpo"),
    "reference": ("dpo", "ipo"),
}
STRENGTH = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}
NORMALISED_STRENGTH = 5.0  # Tulu 3 (arXiv 2411.15124), table 18


@dataclass(frozen=True, kw_only=True)
class DpoSettings(Settings):
    """What preference training adds to the loop's settings, and its own defaults."""

    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = setting(
        "dpo", "What is minimised; kto also takes single answers with a label. orpo and simpo need no reference model."
    )
    beta: float = setting(0.0, "How strongly; 0 takes the loss's own: 0.1, of simpo 2, of length-normalised dpo 5. Of ipo it is tau.")
    length_normalised: bool = setting(
        False, "Divide by answers' lengths, so that longer ones do not count more (dpo; others do by themselves)."
    )
    label_smoothing: float = setting(0.0, "The share of pairs that is held to be the wrong way round (dpo, simpo).")
    sft: float = setting(0.0, "Weight of the chosen answers' own cross-entropy beside the loss; keeps them from becoming unlikely too.")
    margin: float = setting(1.0, "By how much a chosen answer should be ahead: gamma of simpo.")
    desirable: float = setting(1.0, "Weight of wanted answers (kto).")
    undesirable: float = setting(1.0, "Weight of unwanted answers (kto).")
    reference: Literal["cache", "adapter"] = setting(
        "cache", "Where the reference's numbers come from: computed once and kept, or at each step from the base under the adapter."
    )
    epochs: float = setting(1.0, "Times that every pair is read; --steps counts steps instead.")
    length: int = setting(1024, "Tokens of a prompt with its longer answer at most.")
    batch: int = setting(16, "Pairs of a step, over all micro-batches; of kto answers.")
    micro_batch: int | None = setting(
        None,
        f"Pairs computed at once; left out, {AT_ONCE}, or all where there are fewer. "
        "Fewer need less memory and change results by rounding alone.",
    )
    too_long: Literal["skip", "cut"] = setting(
        "skip", "What to do with a pair longer than that: leave it out and count it, or cut its prompt at the left."
    )
    eval_share: float = setting(0.05, "The share of the prompts that is held out for evaluation; --eval-data names files instead.")
    eval_pairs: int = setting(64, "Held-out pairs that are evaluated at most.")
    export_dtype: Literal["float32", "bfloat16"] = setting("float32", "What the weights are exported in.")

    lr: float = setting(1e-6, f"The peak learning rate; of adapters {LORA_LR:g}.")
    schedule: Literal["wsd", "cosine", "constant"] = setting(
        "cosine", "How the rate goes on from its peak: cosine falls all the time, wsd stays and falls at the end."
    )
    warmup: float = setting(0.1, "The share of the steps in which the rate rises.")
    final_lr: float = setting(0.1, "Where it ends, as a share of the peak.")
    weight_decay: float = setting(0.0, "Decoupled decay of matrices; norms, biases and the embedding have none.")
    eval_every: int = setting(50, "Steps between evaluations; 0 evaluates at the start and the end only.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "batch", "eval_pairs"):
            whole(name, getattr(self, name), 2 if name == "length" else 1)
        number("beta", self.beta, 0, 1000)
        number("label_smoothing", self.label_smoothing, 0, 0.5, below=True)
        number("eval_share", self.eval_share, 0, 0.5)
        for name in ("sft", "margin", "desirable", "undesirable"):
            number(name, getattr(self, name), 0, 100)
        if not (math.isfinite(self.epochs) and self.epochs >= 0):
            raise ValueError(f"epochs {self.epochs!r}: must be a number above 0, or 0 where steps are counted")
        rows_at_once(self.micro_batch, self.batch, AT_ONCE, "pairs")
        choices = {"loss": LOSSES, "reference": ("cache", "adapter"), "too_long": ("skip", "cut"), "export_dtype": ("float32", "bfloat16")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: must be one of {', '.join(known)}")
        for field in fields(self):
            if field.name in OF and self.loss not in OF[field.name] and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} {getattr(self, field.name)!r}: the loss {self.loss} has no such setting; {_of(field.name)}")

    @property
    def at_once(self) -> int:
        """Pairs that are computed together."""
        return rows_at_once(self.micro_batch, self.batch, AT_ONCE, "pairs")

    @property
    def strength(self) -> float:
        """Beta, the loss's own where none was given."""
        return self.beta if self.beta else NORMALISED_STRENGTH if self.length_normalised else STRENGTH[self.loss]

    @property
    def imitation(self) -> float:
        """Weight of the chosen answers' cross-entropy in the loss: orpo has it by itself."""
        return 1.0 if self.loss == "orpo" else self.sft

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return self.loss in ("dpo", "ipo", "kto")


def _of(name: str) -> str:
    return f"it is of {' and '.join(OF[name])}"
