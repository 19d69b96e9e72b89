"""The flags of training by adapters, which `qwen2 sft` and `qwen2 dpo` share.

`--lora-rank` says that adapters are trained; the others say more of them, and alone are an error.

    settings = lora_settings(flags)                                  # LoraSettings, or None: the weights themselves are trained
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from cyclopts import Parameter

from qwen2.config.lora import LoraSettings

DEFAULTS = LoraSettings()


def _option(text: str) -> Parameter:
    return Parameter(help=text, negative=(), show_default=False)


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """What is trained instead of the weights. Raises ValueError for flags that say nothing without --lora-rank."""

    lora_rank: Annotated[int | None, _option("Train adapters of this rank instead of the weights: LoRA. Usual are 8 to 64.")] = None
    lora_alpha: Annotated[float | None, _option("What they are scaled by: alpha / rank. Left out, twice the rank.")] = None
    lora_dropout: Annotated[float | None, _option("The share of an adapter's inputs that is left out by chance. Left out, 0.")] = None
    lora_targets: Annotated[
        str | None, _option("Layers that get one: all-linear, attention, or names with commas between. Left out, all-linear.")
    ] = None
    rslora: Annotated[bool, _option("Scale by alpha / root of the rank, which suits ranks above 32.")] = False
    dora: Annotated[bool, _option("Learn the length of each row of the weights too; slower, often a little better.")] = False
    qlora: Annotated[bool, _option("Leave the base in its file's blocks (Q4_K_M and so on): the least memory.")] = False

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None and getattr(self, f.name) is not False]
        if given and self.lora_rank is None:
            raise ValueError(f"--{given[0].replace('_', '-')}: is of adapters; say --lora-rank N too, such as --lora-rank 16")


NO_LORA = LoraFlags()


def lora_settings(flags: LoraFlags) -> LoraSettings | None:
    """What the flags ask for; None without adapters. ValueError naming the flag and its value."""
    if flags.lora_rank is None:
        return None
    given: dict[str, Any] = {
        "rank": flags.lora_rank,
        "alpha": 2.0 * flags.lora_rank if flags.lora_alpha is None else flags.lora_alpha,
        "dropout": DEFAULTS.dropout if flags.lora_dropout is None else flags.lora_dropout,
        "targets": DEFAULTS.targets if flags.lora_targets is None else flags.lora_targets,
    }
    try:
        return LoraSettings(**given, rslora=flags.rslora, dora=flags.dora)
    except ValueError as error:
        raise ValueError(f"--lora-{error}") from None
