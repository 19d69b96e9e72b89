"""What `qwen2 sft` and `qwen2 dpo` share: where a run goes, its settings where it goes on, and the model that it begins with.

Left out: each one's own flags, its data, and its `--dry-run`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from qwen2.cli.lora_flags import NO_LORA, LoraFlags, adapter_folder, lora_settings, same_settings
from qwen2.cli.ranks import first_here, ranks_here
from qwen2.train.changes import AS_MODEL, with_end
from qwen2.train.folder import CONFIG, steps_done, written_config
from qwen2.train.place import ADAPTER, START, is_adapter, is_run

if TYPE_CHECKING:
    from qwen2.config.lora import LoraSettings
    from qwen2.post.rows.reading import Reading
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
    """ValueError where one thing is said in two ways, or neither epochs nor steps say how long the run is."""
    if "steps" in chosen and "epochs" in chosen:
        raise ValueError("--steps and --epochs: give one of them")
    if not chosen.get("epochs", 1) > 0:  # nan too
        raise ValueError(f"--epochs {chosen['epochs']:g}: must be above 0; where steps are counted instead, say --steps N alone")
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


def by_epochs(chosen: dict[str, Any], written: Written | None, epochs: float) -> bool:
    """Whether steps are counted from the epochs: a run that is resumed knows its end, which may have been moved, unless these are given."""
    return bool(epochs) and "steps" not in chosen and (written is None or "epochs" in chosen)


def moved_settings(wanted: dict[str, Any], chosen: dict[str, Any], written: Written | None, place: Place) -> dict[str, Any]:
    """The same with what another end changes beside the steps of a resumed run."""
    if written is None or place.out is None:
        return wanted
    try:
        moved = with_end(written["settings"], wanted["steps"], steps_done(place.out / "checkpoints"), AS_MODEL)
    except ValueError as error:
        raise ValueError(f"{place.out}: settings: {error}") from None
    return {**moved, **chosen, "steps": wanted["steps"]}


@dataclass(frozen=True)
class Adapters:
    """What is trained instead of the weights: how it adapts, whether its base stays in blocks, and the folder that it goes on with."""

    settings: LoraSettings
    packed: bool
    folder: Path | None = None


def adapters_of(lora: LoraFlags, written: Written | None, place: Place) -> Adapters | None:
    """What the flags ask for; of a resumed run what it was started with, where they say nothing. None where weights are trained."""
    from qwen2.config.lora import LoraSettings

    folder = _goes_on_with(lora, written, place)
    if written is not None and "lora" in written and lora in (NO_LORA, replace(NO_LORA, adapter=lora.adapter)):
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in written["lora"].items()}
        return Adapters(LoraSettings(**values), written["start"]["weights"] == "packed", folder)
    if folder is not None:
        from qwen2.post.adapters import settings_of

        return Adapters(same_settings(lora, settings_of(folder)), lora.qlora, folder)
    settings = lora_settings(lora)
    return None if settings is None else Adapters(settings, lora.qlora)


def reading_of(place: Place) -> Reading:
    """How rows are encoded: by as many processes as the run has threads, and said by one process of it."""
    from qwen2.kernels.cores import physical_cores
    from qwen2.post.rows.reading import Reading

    return Reading(max(1, physical_cores() // ranks_here()) if place.threads is None else place.threads, shown=first_here())


def _goes_on_with(lora: LoraFlags, written: Written | None, place: Place) -> Path | None:
    """The folder of the adapter that is trained on, of a resumed run its own copy. ValueError where it is another than the run's."""
    given = None if lora.adapter is None else adapter_folder(lora.adapter)
    if written is None or place.out is None:
        return given
    kept, recorded = place.out / START, written["from"].get("adapter")
    if given is not None:
        from qwen2.weights.adapter import digest_of

        if digest_of(given) != recorded:
            other = "without it" if recorded is None else "with another adapter, of which it has a copy"
            raise ValueError(f"--adapter {lora.adapter}: the run in {place.out} was started {other}; leave --adapter out")
    return kept if recorded is not None and is_adapter(kept) else given


def load_start(model: str, adapters: Adapters | None) -> Model:
    """The model whose weights, or whose adapters, are trained; one that training goes on with is beside it (`Model.adapter`).

    ValueError where weights that shall stay in blocks are not in any.
    """
    loaded = _load(model, adapters is not None and adapters.packed)
    return loaded if adapters is None or adapters.folder is None else loaded.with_adapter(adapters.folder)


def _load(model: str, packed: bool) -> Model:
    from qwen2.train.saved import take
    from qwen2.weights.model import load
    from qwen2.weights.store import Store

    if not packed:
        return take(model, lambda text: print(text, file=sys.stderr), dtype="float32")
    if is_run(model):
        on = (
            f"; or go on with its adapter over the model that it started from: --adapter {model}"
            if is_adapter(Path(model) / ADAPTER)
            else ""
        )
        raise ValueError(f"--qlora: {model} is a run, whose weights are float32: export and quantize it first, or leave --qlora out{on}")
    own = None if Store().is_path(model) else Store().get(model).adapter_path
    if own is not None:
        merged = f"merge it, qwen2 export {model} FOLDER, and quantize that, or leave --qlora out"
        on = f"or go on with it over the model that it was made from: --adapter {own}"
        raise ValueError(f"--qlora: {model} has an adapter, which its blocks cannot take in: {merged}; {on}")
    return load(model, packed=True)
