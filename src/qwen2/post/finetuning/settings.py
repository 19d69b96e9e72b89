"""The settings of supervised fine-tuning: those of the loop, and what concerns conversations. Knows no torch.

Defaults are the Qwen2 report's (section 4.2) where they carry over to small runs: two epochs, the rate down to a tenth of its peak,
weight decay 0.1, gradients clipped at 1. What does not carry over is said in the field's help: the peak rate (7e-6 there, for half a
million examples and large models) and the rows (32,768 tokens there).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qwen2.train.settings import Settings, number, rows_at_once, setting, whole

AT_ONCE = 2  # rows, where nothing is said
LORA_LR = 2e-4  # the peak rate of adapters, which want ten times that of the weights themselves


@dataclass(frozen=True, kw_only=True)
class SftSettings(Settings):
    """What fine-tuning adds to the loop's settings, and its own defaults."""

    epochs: float = setting(2.0, "Times that every example is read; --steps counts steps instead.")
    text_epochs: int = setting(
        1, "Epochs that texts are spread over, conversations not: of N, each reads another Nth of them. Keeps what a model knew before."
    )
    length: int = setting(1024, "Tokens of a row, and of the longest example; the Qwen2 report has 32768.")
    batch: int = setting(8, "Rows of a step, over all micro-batches and ranks; without packing, examples.")
    micro_batch: int | None = setting(
        None,
        f"Rows computed at once; left out, {AT_ONCE}, or all where there are fewer. "
        "Fewer need less memory and change results by rounding alone.",
    )
    packing: bool = setting(True, "Fill rows with several examples, each of which sees itself only; without, a row is an example.")
    too_long: Literal["skip", "cut"] = setting(
        "skip", "What to do with a conversation longer than a row: leave it out and count it, or cut its prompt at the left."
    )
    last_turn: bool = setting(False, "Learn the last answer of a conversation only, not all of them.")
    eval_share: float = setting(0.0, "The share of the prompts that is held out for evaluation; --eval-data names files instead.")
    eval_rows: int = setting(64, "Held-out rows that are evaluated at most.")
    samples: int = setting(2, "Held-out prompts (without any, prompts of the data) that are answered at each evaluation; 0 is none.")
    sample_tokens: int = setting(48, "Tokens of such an answer at most.")
    neftune: float = setting(0.0, "Noise on the embeddings while training (NEFTune), against learning by heart; 5 is usual, 0 is none.")
    z_loss: float = setting(0.0, "Weight of the squared logarithm of each token's normaliser; 1e-4 keeps logits from drifting.")
    balance: float | None = setting(
        None, "Weight of the loss that evens out the experts of a mixture, over the tokens of each row; left out, the model's own."
    )
    export_dtype: Literal["float32", "bfloat16"] = setting("float32", "What the weights are exported in.")

    lr: float = setting(2e-5, f"The peak learning rate; of adapters {LORA_LR:g}. The Qwen2 report has 7e-6, of large models.")
    schedule: Literal["wsd", "cosine", "constant"] = setting(
        "cosine", "How the rate goes on from its peak: cosine falls all the time, wsd stays and falls at the end."
    )
    final_lr: float = setting(0.1, "Where it ends, as a share of the peak.")
    eval_every: int = setting(50, "Steps between evaluations; 0 evaluates at the start and the end only.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "batch", "eval_rows", "sample_tokens"):
            whole(name, getattr(self, name), 2 if name == "length" else 1)
        whole("samples", self.samples, 0)
        whole("text_epochs", self.text_epochs, 1)
        number("eval_share", self.eval_share, 0, 0.5)
        number("neftune", self.neftune, 0, 100)
        number("z_loss", self.z_loss, 0, 1)
        if self.balance is not None:
            number("balance", self.balance, 0, 10)
        if not (math.isfinite(self.epochs) and self.epochs >= 0):
            raise ValueError(f"epochs {self.epochs!r}: must be a number above 0, or 0 where steps are counted")
        rows_at_once(self.micro_batch, self.batch, AT_ONCE)
        if self.too_long not in ("skip", "cut"):
            raise ValueError(f"too_long {self.too_long!r}: must be skip or cut")
        if self.export_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"export_dtype {self.export_dtype!r}: must be float32 or bfloat16")

    @property
    def at_once(self) -> int:
        """Rows that are computed together."""
        return rows_at_once(self.micro_batch, self.batch, AT_ONCE)
