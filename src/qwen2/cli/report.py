"""`qwen2 report`: what became of a recipe's stages, as report.json and one HTML page. Recipes write down each stage they finish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

report = App("report", help_format="plaintext", help_epilogue="Example: qwen2 report page runs/out/base")


@report.command(help_epilogue="Example: qwen2 report page runs/out/base --title 'A base model in 29 languages'")
def page(run: Path, /, *, title: str | None = None) -> None:
    """Write report.json and report.html into a run's folder, from the stages that are finished.

    Parameters
    ----------
    run
        The folder of a recipe's run.
    title
        Of the page; left out, the folder's name.
    """
    from qwen2.cli.list import print_table
    from qwen2.train.page import write_page
    from qwen2.train.report import report as read
    from qwen2.train.report import summary

    path = write_page(run, title)
    print_table(summary(read(run)))
    print(f"{path}: written, and report.json beside it")


@report.command(help_epilogue="Example: qwen2 report add runs/out/base short --kind training --seconds 612")
def add(run: Path, name: str, /, *, kind: str, seconds: float, folder: str | None = None) -> None:
    """Write down that a stage is finished.

    Parameters
    ----------
    run
        The folder of a recipe's run.
    name
        The stage.
    kind
        What it is: corpus, texts, tokenizer, shards, budget, upcycling, training, rows, tuning, sampling, evaluation, export or samples.
    seconds
        How long it took.
    folder
        Where it is, in the run's folder; left out, its name.
    """
    from qwen2.train.report import add as write_down

    write_down(run, name, kind, seconds, folder)


@report.command(help_epilogue="Example: qwen2 report follow runs/out/tiny runs/out/base")
def follow(run: Path, earlier: Path, /) -> None:
    """Begin a run's report with the stages of the run that it goes on from.

    Parameters
    ----------
    run
        The folder of a recipe's run; made where it is not there.
    earlier
        The folder of the run before.
    """
    from qwen2.train.report import follow as begin_with

    begin_with(run, earlier)


@report.command(help_epilogue="Example: qwen2 report has runs/out/base short && echo finished")
def has(run: Path, name: str, /, *, quiet: Annotated[bool, Parameter(negative=())] = False) -> int:
    """Whether a stage is finished: exit code 0, else 1.

    Parameters
    ----------
    run
        The folder of a recipe's run.
    name
        The stage.
    quiet
        Say nothing.
    """
    from qwen2.train.report import stages

    finished = any(stage["name"] == name for stage in stages(run))
    if not quiet:
        print(f"{run / name}: {'finished' if finished else 'not finished'}")
    return 0 if finished else 1
