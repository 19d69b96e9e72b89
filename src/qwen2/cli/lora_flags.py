"""The flags of training by adapters, which `qwen2 sft` and `qwen2 dpo` share.

`--lora-rank` says that new adapters are trained, `--adapter` that training goes on with those of a folder; the others say more of them,
and alone are an error.

    settings = lora_settings(flags)                                  # LoraSettings, or None: the weights themselves are trained
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from qwen2.config.lora import LoraSettings
from qwen2.train.place import ADAPTER, is_adapter, is_run

DEFAULTS = LoraSettings()
LEVEL_ALPHA = 8.0  # of rsLoRA, the same at every rank (arXiv 2312.03732): PEFT's own, and at rank 16 the scale is 2 as without it


def _option(text: str) -> Parameter:
    return Parameter(help=text, negative=(), show_default=False)


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """What is trained instead of the weights. Raises ValueError for flags that say nothing without --lora-rank or --adapter."""

    lora_rank: Annotated[int | None, _option("Train adapters of this rank instead of the weights: LoRA. Usual are 8 to 64.")] = None
    lora_alpha: Annotated[
        float | None,
        _option(
            f"What they are scaled by: alpha / rank. Left out, twice the rank; with --rslora {LEVEL_ALPHA:g}, at rank 16 the same scale."
        ),
    ] = None
    lora_dropout: Annotated[float | None, _option("The share of an adapter's inputs that is left out by chance. Left out, 0.")] = None
    lora_targets: Annotated[
        str | None, _option("Layers that get one: all-linear, attention, or names with commas between. Left out, all-linear.")
    ] = None
    rslora: Annotated[bool, _option("Scale by alpha / root of the rank, which suits ranks above 32.")] = False
    dora: Annotated[bool, _option("Learn the length of each row of the weights too; slower, often a little better.")] = False
    qlora: Annotated[bool, _option("Leave the base in its file's blocks (Q4_K_M and so on): the least memory.")] = False

    adapter: Annotated[
        Path | None,
        _option("Go on training this adapter over MODEL, whose base that is: a folder as PEFT writes it, or a run of adapters."),
    ] = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None and getattr(self, f.name) is not False]
        if given and self.lora_rank is None and self.adapter is None:
            raise ValueError(
                f"--{given[0].replace('_', '-')}: is of adapters; say --lora-rank N too, such as --lora-rank 16, or --adapter FOLDER"
            )


NO_LORA = LoraFlags()


def adapter_folder(given: Path) -> Path:
    """The folder of the adapter that --adapter means. FileNotFoundError where there is none."""
    for folder in (given, given / ADAPTER):
        if is_adapter(folder):
            return folder
    unended = f"; this run has none yet: qwen2 export {given} FOLDER writes its last checkpoint merged" if is_run(given) else ""
    raise FileNotFoundError(f"--adapter {given}: no adapter's folder: adapter_config.json is not there{unended}")


def same_settings(flags: LoraFlags, own: LoraSettings) -> LoraSettings:
    """Those of an adapter that training goes on with; the dropout may be another. ValueError naming the flag that says otherwise."""
    for flag, value, theirs in (
        ("--lora-rank", flags.lora_rank, own.rank),
        ("--lora-alpha", flags.lora_alpha, own.alpha),
        ("--lora-targets", None if flags.lora_targets is None else _in_words(flags.lora_targets), _in_words(own.targets)),
        ("--rslora", flags.rslora or None, own.rslora),
        ("--dora", flags.dora or None, own.dora),
    ):
        if value is not None and value != theirs:
            is_switch = isinstance(value, bool)
            what = (
                "the adapter that training goes on with has none of it"
                if is_switch
                else f"the adapter that training goes on with has {theirs}"
            )
            raise ValueError(f"{flag}{'' if is_switch else f' {value}'}: {what}; leave it out")
    try:
        return own if flags.lora_dropout is None else replace(own, dropout=flags.lora_dropout)
    except ValueError as error:
        raise ValueError(f"--lora-{error}") from None


def _in_words(targets: str | tuple[str, ...]) -> str:
    return ",".join(sorted(targets.split(",") if isinstance(targets, str) else targets))


def lora_settings(flags: LoraFlags) -> LoraSettings | None:
    """What the flags ask for; None without new adapters. ValueError naming the flag and its value."""
    if flags.lora_rank is None:
        return None
    alpha = LEVEL_ALPHA if flags.rslora else 2.0 * flags.lora_rank
    given: dict[str, Any] = {
        "rank": flags.lora_rank,
        "alpha": alpha if flags.lora_alpha is None else flags.lora_alpha,
        "dropout": DEFAULTS.dropout if flags.lora_dropout is None else flags.lora_dropout,
        "targets": DEFAULTS.targets if flags.lora_targets is None else flags.lora_targets,
    }
    try:
        return LoraSettings(**given, rslora=flags.rslora, dora=flags.dora)
    except ValueError as error:
        raise ValueError(f"--lora-{error}") from None
