"""`qwen2 sft`: teach a model to answer, from files of conversations; or show, with --dry-run, what it would learn."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from qwen2.cli.lora_flags import NO_LORA, LoraFlags
from qwen2.cli.ranks import ONE, Ranks, world_of
from qwen2.cli.settings_flags import given, settings_flags
from qwen2.cli.tuning import (
    Adapters,
    Place,
    adapters_of,
    at_least_none,
    by_epochs,
    check_begin,
    check_counts,
    first_settings,
    load_start,
    moved_settings,
    option,
    reading_of,
    written_of,
)
from qwen2.post.finetuning.settings import LORA_LR, SftSettings
from qwen2.train.folder import numbered
from qwen2.train.metrics import where_curves_are
from qwen2.train.place import found_again, is_run, source_of
from qwen2.train.stage import balance_in_words

if TYPE_CHECKING:
    from qwen2.config.lora import LoraSettings
    from qwen2.post.rows.examples import Collected
    from qwen2.post.start import Start

if TYPE_CHECKING:
    Flags = SftSettings
else:
    Flags = settings_flags(SftSettings, __name__, unknown=("steps",))
NO_FLAGS = Flags()


@dataclass(frozen=True, kw_only=True)
class What(Place):
    """What is shown of a run before, and evaluated in it."""

    eval_data: Annotated[list[Path] | None, option("Files of examples that are evaluated and not learned. May be repeated.")] = None
    dry_run: Annotated[bool, option("Train nothing: show the first examples' tokens, lengths, what is left out, time and memory.")] = False
    show: Annotated[int, option("Examples that --dry-run shows token by token.")] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_none(self.show)


NOWHERE = What()


def sft(
    model: str,
    /,
    *data: Path,
    what: Annotated[What, Parameter(name="*")] = NOWHERE,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
    lora: Annotated[LoraFlags, Parameter(name="*")] = NO_LORA,
    ranks: Annotated[Ranks, Parameter(name="*")] = ONE,
) -> None:
    """Fine-tune a model on conversations; the end is a Hugging Face folder, RUN/model, or an adapter, RUN/adapter.

    Parameters
    ----------
    model
        A name, a folder, a file, or a run.
    data
        Files or folders: JSON, CSV, Parquet, Arrow, text; alpaca, ShareGPT, OpenAI messages, prompts with completions, pairs.
    """
    from qwen2.cli.serve import check_device

    check_begin("sft", "conversations", data, what, what.dry_run)
    check_device(what.device)
    written = written_of(what, "sft", SftSettings, own="packing")
    adapters = adapters_of(lora, written, what)
    if not is_run(model):
        from qwen2.cli.pull import ensure

        ensure(model)

    import torch

    from qwen2.post.finetuning.sft import check_window
    from qwen2.post.start import read_start

    if what.threads is not None:
        torch.set_num_threads(what.threads)
    place = _start_of(model, what, written, adapters is not None)
    start = read_start(place, None if adapters is None else adapters.folder)
    settings, found = _prepared(start, data, what, given(flags), written, adapters is not None)
    check_window(start.config, settings)
    if what.dry_run:
        lora_only = None if adapters is None else adapters.settings
        _preview(found, start, settings, lora_only, _file_bytes(place) if adapters is not None and adapters.packed else 0, what)
    else:
        _train(found, place, settings, what, adapters, ranks, _recorded(model, what, written))


def _train(
    found: Collected,
    place: str,
    settings: SftSettings,
    what: What,
    adapters: Adapters | None,
    ranks: Ranks,
    source: str,
) -> None:
    """Load the model and run the job."""
    from qwen2.post.finetuning.sft import Job
    from qwen2.post.finetuning.sft import sft as train

    assert what.out is not None
    loaded, trained = load_start(place, adapters), None if adapters is None else adapters.settings
    with world_of(what.device, ranks) as world:
        if world.main:
            moe = loaded.config.moe
            for line in [*found.lines(), _rows(found, settings), *([] if moe is None else [balance_in_words(settings.balance, moe)])]:
                print(line, file=sys.stderr)
        state = train(Job(found, loaded, settings, what.out, source, what.resume, trained), world)
    if world.main:
        made = what.out / ("model" if adapters is None else "adapter")
        print(f"{made}: written after {state.step:,} steps and {state.tokens:,} tokens{where_curves_are(what.out)}")


def _start_of(model: str, what: What, written: dict[str, Any] | None, adapters: bool) -> str:
    """What is loaded: the model that was named; or, where a run goes on from a checkpoint, that, or where its adapters' base is now."""
    if written is None or what.out is None:
        return model
    if not adapters and numbered(what.out / "checkpoints"):
        return str(what.out)
    return found_again(written["from"], what.out) or model


def _recorded(model: str, what: What, written: dict[str, Any] | None) -> str:
    """The model that was named, as the run's record has it."""
    assert what.out is not None
    return source_of(model, None if written is None else written["from"], what.out)


def _file_bytes(place: str) -> int:
    """The size of a model's file, or of the files in its folder."""
    from qwen2.weights.store import Store

    path = Store().resolve(place)[0]
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def _prepared(
    start: Start, data: tuple[Path, ...], what: What, chosen: dict[str, Any], written: dict[str, Any] | None, adapters: bool
) -> tuple[SftSettings, Collected]:
    """The settings of this run, and its examples; steps follow from the examples where nothing says them."""
    from qwen2.post.finetuning.sft import steps_of
    from qwen2.post.rows.examples import collect
    from qwen2.post.rows.readers import read

    check_counts(chosen, what.eval_data)
    wanted = first_settings(chosen, written, LORA_LR if adapters else None)
    settings = SftSettings(**wanted)
    unused: Counter[str] = Counter()
    with reading_of(what) as reading:
        found = collect(read(data, unused), start.template, settings, read(what.eval_data, unused) if what.eval_data else None, reading)
    found.unused = unused
    if by_epochs(chosen, written, settings.epochs):
        wanted["steps"] = steps_of(found.examples, settings)
    return SftSettings(**moved_settings(wanted, chosen, written, what)), found


def _rows(found: Collected, settings: SftSettings) -> str:
    """What the run reads, in a line."""
    from qwen2.post.rows.preview import rows_in_words

    plan = found.examples.rows(settings).rows
    steps = f"{settings.steps:,} steps of up to {settings.batch} rows: {_times(found, settings):.1f} epochs"
    return f"{rows_in_words(found.examples, settings, plan)}; {steps}"


def _times(found: Collected, settings: SftSettings) -> float:
    """How often the run reads its examples: its epochs, whose last step has what is left, unless its steps are others."""
    from qwen2.post.finetuning.sft import steps_of

    if settings.epochs and settings.steps == steps_of(found.examples, settings):
        return settings.epochs
    return settings.steps * settings.batch / len(found.examples.rows(settings).rows)


def _preview(found: Collected, start: Start, settings: SftSettings, adapters: LoraSettings | None, packed_bytes: int, what: What) -> None:
    """What the run would learn from, and what it would take."""
    import torch
    from rich.console import Console

    from qwen2.post.estimate import expected
    from qwen2.post.rows.preview import examples_shown, histogram
    from qwen2.train.precision import chosen, product_rate
    from qwen2.train.progress import clock
    from qwen2.weights.pull import human_size

    console, device = Console(), torch.device(what.device)
    examples_shown(console, start.template.tokenizer, found.examples, what.show)
    for line in [*histogram(found.examples.lengths, settings.length), *found.lines(), _rows(found, settings)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    dtype = chosen(settings.precision, device)
    an_epoch, learned = found.examples.an_epoch(settings.text_epochs)
    times = _times(found, settings)
    tokens, learned = round(times * an_epoch), round(times * learned)
    rate = product_rate(dtype, device)
    half = dtype == torch.bfloat16
    needed = expected(start.config, settings, tokens, learned, adapters, packed_bytes, rate, half)
    console.print(
        f"about {clock(needed.seconds)} for {tokens:,} tokens on this machine, evaluations not counted, and {human_size(needed.memory)} "
        f"of memory: {human_size(needed.weights)} for the weights and what belongs to them, {human_size(needed.activations)} for "
        f"{settings.at_once} rows at once",
        soft_wrap=True,
        highlight=False,
    )
