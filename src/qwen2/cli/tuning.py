"""What `qwen2 sft` and `qwen2 dpo` share: where a run goes, its settings where it goes on, and the model that it begins with.

Left out: each one's own flags, its data, and its `--dry-run`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from qwen2.cli.lora_flags import NO_LORA, LoraFlags, lora_settings
from qwen2.train.changes import with_end
from qwen2.train.folder import CONFIG, steps_done, written_config
from qwen2.train.place import is_run

if TYPE_CHECKING:
    from qwen2.config.lora import LoraSettings
    from qwen2.weights.model import Model

Written = dict[str, Any]  # a run's config.json


def option(text: str, **more: Any) -> Parameter:
    """A flag and what it says."""
    return Parameter(help=text, negative=(), **more)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run goes, and how it is begun. Each verb says in its own words what is shown and evaluated."""

    out: Annotated[Path | None, option("The run's folder: settings, metrics, checkpoints, curves, and the model at the end.")] = None
    resume: Annotated[bool, option("Go on with the run in --out from its last checkpoint; settings left out are the run's.")] = False
    device: Annotated[str, option("cpu, cuda or cuda:N; under torchrun cuda is a GPU for each process.")] = "cpu"
    threads: Annotated[int | None, option("CPU threads; left out, as many as there are physical cores.")] = None

    def __post_init__(self) -> None:
        if self.out is None and self.resume:
            raise ValueError("--resume: of which run? Name its folder with --out")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads {self.threads}: must be at least 1")


def at_least_none(show: int) -> None:
    """ValueError where fewer than none are to be shown."""
    if show < 0:
        raise ValueError(f"--show {show}: must be 0 or more")


def check_begin(verb: str, what: str, data: tuple[Path, ...], place: Place, dry_run: bool) -> None:
    """ValueError where there is nothing to learn from, or nowhere to put what comes of it."""
    if not data:
        raise ValueError(f"name the data: qwen2 {verb} MODEL DATA..., files or folders of {what}")
    if place.out is None and not dry_run:
        raise ValueError(f"name the run's folder: --out runs/{verb}; or look first, with --dry-run")


def check_counts(chosen: dict[str, Any], eval_data: list[Path] | None) -> None:
    """ValueError where one thing is said in two ways."""
    if "steps" in chosen and "epochs" in chosen:
        raise ValueError("--steps and --epochs: give one of them")
    if eval_data and chosen.get("eval_share"):
        raise ValueError("--eval-data and --eval-share: give one of them")


def written_of(place: Place, verb: str, settings: type, own: str) -> Written | None:
    """What the run's config.json says where it is resumed. ValueError where it is another job's, which has no setting `own`."""
    if not place.resume or place.out is None:
        return None
    written, path = written_config(place.out, ("settings", "start", "data", "from")), place.out / CONFIG
    if own not in written["settings"]:
        raise ValueError(f"{path}: not a run of qwen2 {verb}; name that with --out")
    unknown = written["settings"].keys() - {f.name for f in fields(settings)}
    if unknown:
        raise ValueError(f"{path}: settings: {min(unknown)}: unknown to this version")
    return written


def first_settings(chosen: dict[str, Any], written: Written | None, adapted_lr: float | None) -> dict[str, Any]:
    """What is known of the settings before the data are read: 1 step, where they are counted later. `adapted_lr`: of adapters."""
    counted = {"epochs": 0.0} if "steps" in chosen and written is None else {}
    rate = {} if adapted_lr is None else {"lr": adapted_lr}
    return {"steps": 1, **rate, **counted, **({} if written is None else written["settings"]), **chosen}


def moved_settings(wanted: dict[str, Any], chosen: dict[str, Any], written: Written | None, place: Place) -> dict[str, Any]:
    """The same with what another end changes beside the steps of a resumed run."""
    if written is None or place.out is None:
        return wanted
    try:
        moved = with_end(written["settings"], wanted["steps"], steps_done(place.out / "checkpoints"))
    except ValueError as error:
        raise ValueError(f"{place.out}: settings: {error}") from None
    return {**moved, **chosen, "steps": wanted["steps"]}


def adapters_of(lora: LoraFlags, written: Written | None) -> tuple[LoraSettings | None, bool]:
    """What is trained instead of the weights, and whether their base stays in blocks; of a resumed run what it was started with."""
    from qwen2.config.lora import LoraSettings

    if written is None or "lora" not in written or lora != NO_LORA:
        return lora_settings(lora), lora.qlora
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in written["lora"].items()}
    return LoraSettings(**values), written["start"]["weights"] == "packed"


def load_start(model: str, packed: bool) -> Model:
    """The model whose weights, or whose adapters, are trained."""
    from qwen2.train.saved import take
    from qwen2.weights.model import load

    if not packed:
        return take(model, lambda text: print(text, file=sys.stderr), dtype="float32")
    if is_run(model):
        raise ValueError(f"--qlora: {model} is a run, whose weights are float32: export and quantize it first, or leave --qlora out")
    return load(model, packed=True)
