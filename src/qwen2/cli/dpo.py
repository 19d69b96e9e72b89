"""`qwen2 dpo`: train a model on pairs of answers, one better than the other, or (KTO) on answers with a label."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, fields, make_dataclass, replace
from dataclasses import field as new_field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_type_hints

from cyclopts import Parameter

from qwen2.cli.lora_flags import NO_LORA, LoraFlags, lora_settings
from qwen2.post.dpo_settings import LORA_LR, DpoSettings
from qwen2.train.changes import with_end
from qwen2.train.folder import steps_done
from qwen2.train.place import found_again, is_adapter, is_run, source_of

if TYPE_CHECKING:
    from qwen2.config.lora import LoraSettings
    from qwen2.post.pairs import Collected
    from qwen2.weights.model import Model

HINTS = get_type_hints(DpoSettings)
OWN = {"steps": "Optimizer steps of the whole run, in place of --epochs."}  # help of flags that mean a little more here
UNKNOWN = (0, 0.0)  # defaults that say "the usual", which the help tells


def _flag(name: str, default: Any, text: str) -> tuple[str, Any, Any]:
    switch = HINTS[name] is bool
    shown = str(default).lower() if switch else str(default)
    known = switch or (default not in UNKNOWN and name != "steps")
    parameter = Parameter(help=OWN.get(name, text), show_default=shown if known else False, negative=None if switch else ())
    return name, Annotated[Optional[HINTS[name]], parameter], new_field(default=None)  # noqa: UP045


if TYPE_CHECKING:
    Flags = DpoSettings
else:  # an optional field per setting; None where the flag was not given, so that a resumed run keeps its own
    Flags = make_dataclass("Flags", [_flag(f.name, f.default, f.metadata["help"]) for f in fields(DpoSettings)], frozen=True)
    Flags.__module__ = __name__
NO_FLAGS = Flags()


def _option(text: str, **more: Any) -> Parameter:
    return Parameter(help=text, negative=(), **more)


@dataclass(frozen=True, kw_only=True)
class What:
    """Where a run goes, and how it is begun."""

    out: Annotated[Path, _option("The run's folder: settings, metrics, checkpoints, curves, and the model at the end.")]
    eval_data: Annotated[list[Path] | None, _option("Files of pairs that are evaluated; left out, a share of the data is.")] = None
    resume: Annotated[bool, _option("Go on with the run in --out from its last checkpoint; settings left out are the run's.")] = False
    dry_run: Annotated[bool, _option("Train nothing: show tokens with what is scored of them, lengths, what is left out and why.")] = False
    device: Annotated[str, _option("cpu, cuda or cuda:N.")] = "cpu"
    threads: Annotated[int | None, _option("CPU threads; left out, as many as there are physical cores.")] = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads {self.threads}: must be at least 1")


def dpo(
    model: str,
    /,
    *data: Path,
    what: Annotated[What, Parameter(name="*")],
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
    lora: Annotated[LoraFlags, Parameter(name="*")] = NO_LORA,
) -> None:
    """Train on preferences: the likelihood of chosen answers against that of rejected ones.

    Parameters
    ----------
    model
        What it starts from, and is compared with: a run, a checkpoint of one, a folder, a file or a name.
    data
        Files or folders of pairs: JSON lines, JSON, Parquet, in the formats of the field's tools.
    """
    if not data:
        raise ValueError("name a file or a folder of pairs: qwen2 dpo MODEL PAIRS.jsonl --out RUN")
    from qwen2.cli.serve import check_device

    check_device(what.device)
    adapters = lora_settings(lora)
    settings, written = _settings(what, {f.name: getattr(flags, f.name) for f in fields(flags)}, adapters is not None)

    import torch

    from qwen2.post.dpo import Job
    from qwen2.post.dpo import dpo as train
    from qwen2.train.world import World

    if what.threads is not None:
        torch.set_num_threads(what.threads)
    source = source_of(model, None if written is None else written["from"], what.out)
    start = _load(model if written is None else found_again(written["from"], what.out) or model, lora.qlora)
    found = _collected(data, what, start, settings)
    for line in found.lines():
        print(line, file=sys.stderr)
    if settings.epochs:
        settings = replace(settings, steps=max(1, -(-round(settings.epochs * len(found.items)) // settings.batch)))
    settings = _moved(settings, written, what)
    if what.dry_run:
        show(start, found, settings)
        return
    job = Job(found, start, settings, what.out, source, what.resume, adapters)
    _describe(job.data, settings, adapters)
    state = train(job, World(what.device))
    place, done = what.out / ("model" if adapters is None else "adapter"), f"{state.step:,} steps and {state.tokens:,} tokens"
    print(f"{place}: written after {done}; curves in {what.out / 'curves.png'}")


def _settings(what: What, flags: dict[str, Any], adapted: bool) -> tuple[DpoSettings, dict[str, Any] | None]:
    """The settings of this run, its steps still to be counted, and what its config.json says where it is resumed."""
    from qwen2.weights.json_object import read_json

    given = {name: value for name, value in flags.items() if value is not None}
    if "steps" in given and given.get("epochs"):
        raise ValueError("--steps and --epochs: give one of them")
    if "steps" in given:
        given["epochs"] = 0.0
    base: dict[str, Any] = {"lr": LORA_LR} if adapted else {}
    written = None
    path = what.out / "config.json"
    if what.resume:
        if not path.exists():
            raise FileNotFoundError(f"{what.out}: no run to resume here ({path.name} is missing); leave --resume out to start one")
        written = read_json(path)
        base = dict(written["settings"])
        unknown = base.keys() - HINTS.keys()
        if unknown:
            raise ValueError(f"{path}: settings: {min(unknown)}: unknown to this version")
    return DpoSettings(**{**base, **given}), written


def _moved(settings: DpoSettings, written: dict[str, Any] | None, what: What) -> DpoSettings:
    """The settings with what another end changes beside the steps."""
    if written is None or settings.steps == written["settings"]["steps"]:
        return settings
    try:
        moved = with_end(written["settings"], settings.steps, steps_done(what.out / "checkpoints"))
    except ValueError as error:
        raise ValueError(f"{what.out}: settings: {error}") from None
    return replace(settings, warmup=moved["warmup"], decay=moved["decay"])


def _load(source: str, packed: bool) -> Model:
    """The model that a run starts from: a run's, or any other; for QLoRA its matrices stay in their blocks."""
    from qwen2.cli.pull import ensure
    from qwen2.train.saved import take
    from qwen2.weights.model import load

    if not is_run(source) and not is_adapter(source):
        ensure(source)
        if packed:
            return load(source, packed=True)
    if packed:
        raise ValueError(f"--qlora: {source} is a run, whose weights are plain; export and quantize it first: qwen2 quantize")
    return take(source, lambda text: print(text, file=sys.stderr), dtype="float32")


def _collected(data: tuple[Path, ...], what: What, start: Model, settings: DpoSettings) -> Collected:
    """The pairs, encoded; files that are named for evaluation hold no share of the data out."""
    from qwen2.post.pairs import collect
    from qwen2.post.readers import read

    unused: Counter[str] = Counter()
    held = what.eval_data is not None
    wanted = replace(settings, eval_share=0.0) if held else settings
    found = collect(read(data, unused), start.template, wanted, read(what.eval_data, unused) if what.eval_data else ())
    found.unused = unused
    return found


def _describe(found: Collected, settings: DpoSettings, lora: LoraSettings | None) -> None:
    """What is about to be trained."""
    what = f"loss {settings.loss}, beta {settings.strength:g}" + ("" if lora is None else f", adapters of rank {lora.rank}")
    epochs = settings.steps * settings.batch / max(len(found.items), 1)
    print(f"{what}; {settings.steps:,} steps of {settings.batch}, {epochs:.2f} times through the data", file=sys.stderr)


def show(start: Model, found: Collected, settings: DpoSettings) -> None:
    """What a run would read: the first pairs as tokens, those that are scored in colour, and how long they are."""
    from rich.console import Console
    from rich.text import Text

    console, tokenizer = Console(highlight=False, soft_wrap=True), start.tokenizer
    for group, where in list(zip(found.items.groups, found.items.where, strict=True))[:2]:
        console.print(Text(where, style="bold"))
        console.print(Text("prompt   ") + Text(tokenizer.decode(list(group.prompt)), style="dim"))
        names = ("answer  ", "of other") if found.items.wanted else ("chosen  ", "rejected")
        for name, answer, colour in zip(names, group.answers, ("green", "red"), strict=False):
            line = Text(f"{name} ")
            for id, scored in zip(answer.ids, answer.mask, strict=True):
                line.append(f"[{tokenizer.decode([id])}]" if scored else tokenizer.decode([id]), style=colour if scored else "dim")
            console.print(line)
    lengths = sorted(group.longest for group in found.items.groups)
    quarter = [lengths[min(len(lengths) - 1, len(lengths) * part // 4)] for part in (1, 2, 3)]
    console.print(f"tokens of a prompt with its longer answer: {lengths[0]} to {lengths[-1]}, quartiles {', '.join(map(str, quarter))}")
    shared = sum(len(group.prompt) * (len(group.answers) - 1) for group in found.items.groups)
    console.print(f"{found.items.tokens:,} tokens an epoch; {shared:,} more if prompts were not shared by their answers")
    console.print(
        f"{settings.steps:,} steps of {settings.batch}, {settings.micro_batch} at once; loss {settings.loss}, beta {settings.strength:g}"
    )
