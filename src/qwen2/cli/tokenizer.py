"""`qwen2 tokenizer train` and `compare`: learn a vocabulary from texts, and see how well vocabularies fit texts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from qwen2.cli.list import print_table
from qwen2.tokenizer.compare import Fit, measure, overall
from qwen2.tokenizer.texts import read_texts
from qwen2.tokenizer.tokenizer import Tokenizer
from qwen2.tokenizer.train import Sampled, Settings, learn
from qwen2.weights.pull import human_size

if TYPE_CHECKING:
    from collections.abc import Mapping

tokenizer = App("tokenizer", help_format="plaintext", help_epilogue="Example: qwen2 tokenizer train documents/ --out tokenizer")


@tokenizer.command(help_epilogue="Example: qwen2 tokenizer train documents/ de=grimm.txt --vocab 8192 --out tokenizer")
def train(*texts: str, out: Path, split: str = "train", settings: Annotated[Settings | None, Parameter(name="*")] = None) -> None:
    """Learn a byte-level BPE vocabulary with Qwen2's split pattern and control tokens.

    Parameters
    ----------
    texts
        Files of JSON lines with text and language, plain text files (de=FILE says their language), or folders, of which .jsonl and
        .txt files are read.
    out
        The folder to write: tokenizer.json and what else transformers reads, and training.json with what was done.
    split
        Of documents that are marked with a split, those of this one.
    settings
        How it is learned.
    """
    settings = Settings() if settings is None else settings
    if not texts:
        raise ValueError("no texts: name files or folders to learn from")
    if out.exists():
        raise FileExistsError(f"{out}: exists already; write the tokenizer into a new folder")
    with _Counter() as watch:
        learned = learn(partial(read_texts, texts, split), settings, watch)
    learned.save(out)
    _print_languages(learned.languages)
    if not learned.full:
        size = learned.tokenizer.vocab_size
        print(
            f"qwen2: {size:,} entries, not {settings.vocab:,}: no more pairs occur {settings.least} times; give more text", file=sys.stderr
        )
    sampled = sum(entry.sampled for entry in learned.languages.values())
    print(f"{out}: {learned.tokenizer.vocab_size:,} entries, learned from {human_size(sampled)} in {len(learned.languages)} languages")


@tokenizer.command(help_epilogue="Example: qwen2 tokenizer compare ./tokenizer qwen2.5-coder:0.5b --texts held-out/ --picture fit.svg")
def compare(
    *models: str,
    texts: Annotated[list[str], Parameter(consume_multiple=True)],
    split: str = "held-out",
    most: int | None = 1_000_000,
    picture: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Show how many bytes of each language a token stands for, by vocabulary. More is better.

    Parameters
    ----------
    models
        Tokenizers: folders, GGUF files or names of models.
    texts
        What to measure on, best what none of them has learned from: as qwen2 tokenizer train takes it.
    split
        Of documents that are marked with a split, those of this one.
    most
        Bytes of each language, at most.
    picture
        Write a chart into this file, as SVG.
    json_
        As JSON.
    """
    if not models:
        raise ValueError("no tokenizers: name folders, GGUF files or models")
    if picture is not None:
        from qwen2.train.folder import check_writable

        check_writable(picture)
    fits = measure({_label(model): load_tokenizer(model) for model in models}, read_texts(texts, split), most)
    if picture is not None:
        from qwen2.train.charts import dot_chart

        picture.write_text(dot_chart({language: fit.per_token for language, fit in fits.items()}, "bytes a token"), encoding="utf-8")
    if json_:
        print(json.dumps({language: asdict(fit) | {"bytes_per_token": fit.per_token} for language, fit in fits.items()}, indent=2))
    else:
        _print_fits(fits)


def load_tokenizer(source: str) -> Tokenizer:
    """A tokenizer's folder, a GGUF file, or the tokenizer of a model by name."""
    from qwen2.cli.pull import ensure
    from qwen2.weights.gguf import GGUFFile
    from qwen2.weights.store import Store

    ensure(source)
    path, _ = Store().resolve(source)
    if path.is_dir():
        return Tokenizer.from_folder(path)
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file.metadata)


def _label(model: str) -> str:
    return Path(model).name or model


def _print_languages(languages: Mapping[str, Sampled]) -> None:
    print_table(
        [
            {"language": language, "texts": f"{x.documents:,}", "there": human_size(x.bytes), "learned from": human_size(x.sampled)}
            for language, x in languages.items()
        ]
    )


def _print_fits(fits: Mapping[str, Fit]) -> None:
    rows = {language: fit.per_token for language, fit in fits.items()} | {"mean": overall(fits)}
    print_table([{"bytes a token": language} | {name: f"{value:.2f}" for name, value in row.items()} for language, row in rows.items()])


class _Counter:
    """How far the reading is, on stderr where that is a terminal."""

    def __enter__(self) -> _Counter:
        self._shown = 0
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print(file=sys.stderr)

    def __call__(self, doing: str, done: int, total: int) -> None:
        if sys.stderr.isatty() and (done < self._shown or done > self._shown + 500_000):
            self._shown = done
            print(f"\r{doing}: {human_size(done)} of text ", end="", file=sys.stderr, flush=True)
