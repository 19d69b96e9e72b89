"""`qwen2 dpo`: train a model on pairs of answers, one better than the other, or (KTO) on answers with a label."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qwen2.cli.lora_flags import NO_LORA, LoraFlags
from qwen2.cli.ranks import ONE, Ranks, world_of
from qwen2.cli.settings_flags import given, settings_flags
from qwen2.cli.tuning import (
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
from qwen2.post.preference.settings import LORA_LR, DpoSettings
from qwen2.train.metrics import where_curves_are
from qwen2.train.place import found_again, is_run, source_of
from qwen2.train.settings import as_dict

if TYPE_CHECKING:
    from qwen2.post.preference.dpo import Job
    from qwen2.post.preference.pairs import Collected
    from qwen2.tokenizer import ChatTemplate, Tokenizer

if TYPE_CHECKING:
    Flags = DpoSettings
else:  # an optional field per setting; None where the flag was not given, so that a resumed run keeps its own
    Flags = settings_flags(DpoSettings, __name__, unknown=("steps",))
NO_FLAGS = Flags()
SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class What(Place):
    """What is shown of a run before, and evaluated in it."""

    eval_data: Annotated[list[Path] | None, option("Files of pairs that are evaluated; left out, a share of the data is.")] = None
    dry_run: Annotated[bool, option("Train nothing: show the first pairs' tokens, lengths, what is left out and why.")] = False
    show: Annotated[int, option("Pairs that --dry-run shows token by token.")] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_none(self.show)


NOWHERE = What()


def dpo(
    model: str,
    /,
    *data: Path,
    what: Annotated[What, Parameter(name="*")] = NOWHERE,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
    lora: Annotated[LoraFlags, Parameter(name="*")] = NO_LORA,
    ranks: Annotated[Ranks, Parameter(name="*")] = ONE,
) -> None:
    """Train on preferences: the likelihood of chosen answers against that of rejected ones. The end is RUN/model, or RUN/adapter.

    Parameters
    ----------
    model
        What it starts from and is compared with: a run, a checkpoint of one, a folder, a file or a name.
    data
        Files or folders of pairs (of --loss kto also answers with a label): JSON lines, JSON arrays, CSV, Parquet, Arrow.
    """
    from qwen2.cli.serve import check_device

    check_begin("dpo", "pairs", data, what, what.dry_run)
    check_device(what.device)
    written = written_of(what, "dpo", DpoSettings, own="loss")
    adapters = adapters_of(lora, written, what)
    chosen = given(flags)
    check_counts(chosen, what.eval_data)
    settings = DpoSettings(**first_settings(chosen, written, None if adapters is None else LORA_LR))
    if not is_run(model):
        from qwen2.cli.pull import ensure

        ensure(model)

    import torch

    from qwen2.post.preference.dpo import Job, check_window
    from qwen2.post.preference.pairs import last_of, turns_of
    from qwen2.post.start import read_start

    if what.threads is not None:
        torch.set_num_threads(what.threads)
    place = model if written is None or what.out is None else found_again(written["from"], what.out) or model
    start = read_start(place, None if adapters is None else adapters.folder)
    check_window(start.config, settings)
    found = _collected(data, what, start.template, settings)
    if by_epochs(chosen, written, settings.epochs):
        settings = replace(settings, steps=-(-turns_of(len(found.items), settings.epochs) // settings.batch))
    settings = DpoSettings(**moved_settings(as_dict(settings), chosen, written, what))
    times = (last_of(len(found.items), settings) or settings.steps * settings.batch) / len(found.items)
    trained = "" if adapters is None else f", adapters of rank {adapters.settings.rank}"
    steps = f"{settings.steps:,} steps of up to {settings.batch}: {times:.2f} epochs"
    lines = [*found.lines(), f"loss {settings.loss}, beta {settings.strength:g}{trained}; {steps}"]
    if what.dry_run:
        print(*lines, sep="\n", file=sys.stderr)
        _preview(found, start.template.tokenizer, settings, what.show)
    else:
        assert what.out is not None
        loaded, lora_only = load_start(place, adapters), None if adapters is None else adapters.settings
        source = source_of(model, written and written["from"], what.out)
        _train(Job(found, loaded, settings, what.out, source, what.resume, lora_only), what, ranks, lines)


def _train(job: Job, what: What, ranks: Ranks, lines: list[str]) -> None:
    """Run the job, once these lines are said."""
    from qwen2.post.preference.dpo import dpo as train

    with world_of(what.device, ranks) as world:
        if world.main:
            print(*lines, sep="\n", file=sys.stderr)
        state = train(job, world)
    if world.main:
        made = job.out / ("model" if job.lora is None else "adapter")
        print(f"{made}: written after {state.step:,} steps and {state.tokens:,} tokens{where_curves_are(job.out)}")


def _collected(data: tuple[Path, ...], what: What, template: ChatTemplate, settings: DpoSettings) -> Collected:
    """The pairs, encoded; where files are named for evaluation no share of the data is held out."""
    from qwen2.post.preference.pairs import collect
    from qwen2.post.rows.readers import read

    unused: Counter[str] = Counter()
    settings = replace(settings, eval_share=0.0) if what.eval_data else settings
    with reading_of(what) as reading:
        found = collect(read(data, unused), template, settings, read(what.eval_data, unused) if what.eval_data else None, reading)
    found.unused = unused
    return found


def _preview(found: Collected, tokenizer: Tokenizer, settings: DpoSettings, count: int) -> None:
    """What a run would read: the first pairs token by token, and how long prompts with their longer answers are."""
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from qwen2.post.rows.preview import histogram, show

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
