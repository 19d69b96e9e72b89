"""`qwen2 dpo`: train a model on pairs of answers, one better than the other, or (KTO) on answers with a label."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from qwen2.cli.lora_flags import NO_LORA, LoraFlags, lora_settings
from qwen2.cli.settings_flags import given, settings_flags
from qwen2.post.dpo_settings import LORA_LR, DpoSettings
from qwen2.train.changes import with_end
from qwen2.train.folder import steps_done
from qwen2.train.place import found_again, is_run, source_of

if TYPE_CHECKING:
    from qwen2.config.lora import LoraSettings
    from qwen2.post.pairs import Collected
    from qwen2.tokenizer import ChatTemplate, Tokenizer
    from qwen2.weights.model import Model

if TYPE_CHECKING:
    Flags = DpoSettings
else:  # an optional field per setting; None where the flag was not given, so that a resumed run keeps its own
    Flags = settings_flags(DpoSettings, __name__, unknown=("steps",))
NO_FLAGS = Flags()
SIDES = ("chosen", "rejected")


def _option(text: str, **more: Any) -> Parameter:
    return Parameter(help=text, negative=(), **more)


@dataclass(frozen=True, kw_only=True)
class What:
    """Where a run goes, and how it is begun."""

    out: Annotated[Path | None, _option("The run's folder: settings, metrics, checkpoints, curves, and the model at the end.")] = None
    eval_data: Annotated[list[Path] | None, _option("Files of pairs that are evaluated; left out, a share of the data is.")] = None
    resume: Annotated[bool, _option("Go on with the run in --out from its last checkpoint; settings left out are the run's.")] = False
    dry_run: Annotated[bool, _option("Train nothing: show the first pairs' tokens, lengths, what is left out and why.")] = False
    show: Annotated[int, _option("Pairs that --dry-run shows token by token.")] = 2
    device: Annotated[str, _option("cpu, cuda or cuda:N.")] = "cpu"
    threads: Annotated[int | None, _option("CPU threads; left out, as many as there are physical cores.")] = None

    def __post_init__(self) -> None:
        if self.out is None and self.resume:
            raise ValueError("--resume: of which run? Name its folder with --out")
        if self.show < 0:
            raise ValueError(f"--show {self.show}: must be 0 or more")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads {self.threads}: must be at least 1")


NOWHERE = What()


def dpo(
    model: str,
    /,
    *data: Path,
    what: Annotated[What, Parameter(name="*")] = NOWHERE,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
    lora: Annotated[LoraFlags, Parameter(name="*")] = NO_LORA,
) -> None:
    """Train on preferences: the likelihood of chosen answers against that of rejected ones. The end is RUN/model, or RUN/adapter.

    Parameters
    ----------
    model
        What it starts from and is compared with: a run, a checkpoint of one, a folder, a file or a name.
    data
        Files or folders of pairs (of --loss kto also answers with a label): JSON lines, JSON arrays, Parquet.
    """
    from qwen2.cli.serve import check_device

    if not data:
        raise ValueError("name the data: qwen2 dpo MODEL DATA..., files or folders of pairs")
    if what.out is None and not what.dry_run:
        raise ValueError("name the run's folder: --out runs/dpo; or look first, with --dry-run")
    check_device(what.device)
    written = _written(what)
    adapters, packed = _adapters(lora, written)
    chosen = given(flags)
    settings = _settings(chosen, written, adapters is not None)
    if not is_run(model):
        from qwen2.cli.pull import ensure

        ensure(model)

    import torch

    from qwen2.post.dpo import check_window
    from qwen2.post.start import read_start

    if what.threads is not None:
        torch.set_num_threads(what.threads)
    place = model if written is None or what.out is None else found_again(written["from"], what.out) or model
    start = read_start(place)
    check_window(start.config, settings)
    found = _collected(data, what, start.template, settings)
    for line in found.lines():
        print(line, file=sys.stderr)
    if "steps" not in chosen and settings.epochs:
        settings = replace(settings, steps=max(1, -(-round(settings.epochs * len(found.items)) // settings.batch)))
    settings = _moved(settings, written, chosen, what)
    times = settings.steps * settings.batch / len(found.items)
    trained = "" if adapters is None else f", adapters of rank {adapters.rank}"
    said = f"loss {settings.loss}, beta {settings.strength:g}{trained}; {settings.steps:,} steps of {settings.batch}: {times:.2f} epochs"
    print(said, file=sys.stderr)
    if what.dry_run:
        _preview(found, start.template.tokenizer, settings, what.show)
    else:
        assert what.out is not None
        _train(found, place, settings, what, adapters, packed, source_of(model, written and written["from"], what.out))


def _train(
    found: Collected, place: str, settings: DpoSettings, what: What, adapters: LoraSettings | None, packed: bool, source: str
) -> None:
    """Load the model and run the job."""
    from qwen2.post.dpo import Job
    from qwen2.post.dpo import dpo as train
    from qwen2.train.world import World

    assert what.out is not None
    state = train(Job(found, _load(place, packed), settings, what.out, source, what.resume, adapters), World(what.device))
    made = what.out / ("model" if adapters is None else "adapter")
    print(f"{made}: written after {state.step:,} steps and {state.tokens:,} tokens; curves in {what.out / 'curves.png'}")


def _load(place: str, packed: bool) -> Model:
    """The model whose weights, or whose adapters, are trained."""
    from qwen2.train.saved import take
    from qwen2.weights.model import load

    if not packed:
        return take(place, lambda text: print(text, file=sys.stderr), dtype="float32")
    if is_run(place):
        raise ValueError(f"--qlora: {place} is a run, whose weights are float32: export and quantize it first, or leave --qlora out")
    return load(place, packed=True)


def _settings(chosen: dict[str, Any], written: dict[str, Any] | None, adapted: bool) -> DpoSettings:
    """The settings of this run, its steps still to be counted where they were not given."""
    if "steps" in chosen and "epochs" in chosen:
        raise ValueError("--steps and --epochs: give one of them")
    counted = {"epochs": 0.0} if "steps" in chosen and written is None else {}
    base = {} if written is None else dict(written["settings"])
    return DpoSettings(**{"steps": 1, **({"lr": LORA_LR} if adapted else {}), **counted, **base, **chosen})


def _adapters(lora: LoraFlags, written: dict[str, Any] | None) -> tuple[LoraSettings | None, bool]:
    """What is trained instead of the weights, and whether their base stays in blocks; of a resumed run what it was started with."""
    from qwen2.config.lora import LoraSettings

    if written is None or "lora" not in written or lora != NO_LORA:
        return lora_settings(lora), lora.qlora
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in written["lora"].items()}
    return LoraSettings(**values), written["start"]["weights"] == "packed"


def _written(what: What) -> dict[str, Any] | None:
    """What the run's config.json says where it is resumed."""
    from qwen2.weights.json_object import read_json

    if not what.resume or what.out is None:
        return None
    path = what.out / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{what.out}: no run to resume here ({path.name} is missing); leave --resume out to start one")
    written = read_json(path)
    if "loss" not in written.get("settings", {}):
        raise ValueError(f"{path}: not a run of qwen2 dpo; name that with --out")
    unknown = written["settings"].keys() - {f.name for f in fields(DpoSettings)}
    if unknown:
        raise ValueError(f"{path}: settings: {min(unknown)}: unknown to this version")
    return written


def _moved(settings: DpoSettings, written: dict[str, Any] | None, chosen: dict[str, Any], what: What) -> DpoSettings:
    """The settings of a resumed run with what another end changes beside its steps."""
    if written is None or what.out is None:
        return settings
    try:
        moved = with_end(written["settings"], settings.steps, steps_done(what.out / "checkpoints"))
    except ValueError as error:
        raise ValueError(f"{what.out}: settings: {error}") from None
    return DpoSettings(**{**moved, **chosen, "steps": settings.steps})


def _collected(data: tuple[Path, ...], what: What, template: ChatTemplate, settings: DpoSettings) -> Collected:
    """The pairs, encoded; where files are named for evaluation no share of the data is held out."""
    from qwen2.post.pairs import collect
    from qwen2.post.readers import read

    unused: Counter[str] = Counter()
    settings = replace(settings, eval_share=0.0) if what.eval_data else settings
    found = collect(read(data, unused), template, settings, read(what.eval_data or [], unused))
    found.unused = unused
    return found


def _preview(found: Collected, tokenizer: Tokenizer, settings: DpoSettings, count: int) -> None:
    """What a run would read: the first pairs token by token, and how long prompts with their longer answers are."""
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from qwen2.post.preview import histogram, show

    console, groups = Console(), found.items.groups
    for group, where in list(zip(groups, found.items.where, strict=True))[:count]:
        names = ("answer", "the next prompt's answer, which the divergence is estimated from") if found.items.wanted else SIDES
        for name, answer in zip(names, group.answers, strict=True):
            console.print(Text(f"--- {where}: {name}, {answer.length:,} tokens scored", style="bold"), soft_wrap=True, highlight=False)
            ids, mask = [*group.prompt, *answer.ids], [False] * len(group.prompt) + [bool(sampled) for sampled in answer.mask]
            show(console, tokenizer, ids, mask)
    shared = sum(len(group.prompt) * (len(group.answers) - 1) for group in groups)
    for line in [
        *histogram(np.array([group.longest for group in groups]), settings.length),
        f"{found.items.tokens:,} tokens an epoch; {shared:,} more if a prompt were computed for each of its answers",
    ]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
