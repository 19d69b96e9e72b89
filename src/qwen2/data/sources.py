"""From a recipe's sources to files, and which task reads which: large files first, each to the task that has least to do.

Left out: reading them (`readers.py`).
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from qwen2.data.fetch import CORPUS
from qwen2.data.packages import PACKAGES, Role
from qwen2.data.readers import Input, format_of
from qwen2.data.recipe import DETECT, FORMATS, Recipe, Source


@dataclass(frozen=True)
class Missing:
    """A package of a recipe that could not be had when the corpus was fetched."""

    source: str
    package: str
    role: Role
    why: str


def inputs_of(
    recipe: Recipe, base: Path, corpus: Path | None, without: Mapping[str, str] | None = None
) -> tuple[list[list[Input]], list[Input], list[Missing]]:
    """The files of each task, those of evaluation sets, and what is missing. FileNotFoundError for a source of which nothing is there.

    `base` is the folder that paths start from, `corpus` what `qwen2 data fetch` wrote. Missing are packages that could not be had when
    the corpus was fetched, as corpus.json says, and those of `without`: package, and why.
    """
    found: list[Input] = []
    missing: list[Missing] = []
    for source in recipe.sources:
        gone = _gone(corpus, without or {}).get(source.package)
        if gone is not None:
            role = PACKAGES[source.package].role
            assert role in get_args(Role)  # which a recipe checks
            missing.append(Missing(source.label, source.package, cast(Role, role), gone))
        else:
            found += [_of_package(source, corpus)] if source.package else _of_path(source, base)
    training = [entry for entry in found if entry.source.role != "evaluation"]
    if not any(entry.source.role == "train" for entry in training):
        raise ValueError(f"recipe {recipe.name}: no file of training text is there")
    plan: list[list[Input]] = [[] for _ in range(recipe.tasks)]
    loads = [0] * recipe.tasks
    for entry in sorted(training, key=lambda entry: (-_cost(entry), entry.source.label, entry.path)):
        task = loads.index(min(loads))
        plan[task].append(entry)
        loads[task] += _cost(entry)
    return plan, [entry for entry in found if entry.source.role == "evaluation"], missing


def _cost(entry: Input) -> int:
    return min(entry.size, 4 * entry.source.most_bytes) if entry.source.most_bytes else entry.size


def _gone(corpus: Path | None, without: Mapping[str, str]) -> dict[str, str]:
    known = {} if corpus is None or not (corpus / CORPUS).is_file() else json.loads((corpus / CORPUS).read_text(encoding="utf-8"))
    return {**known.get("gone", {}), **without}


def _of_package(source: Source, corpus: Path | None) -> Input:
    name = source.package
    if corpus is None or not (corpus / CORPUS).is_file():
        place = "--corpus FOLDER" if corpus is None else f"{corpus} has no {CORPUS}"
        raise FileNotFoundError(f"{name}: {place}: fetch it with qwen2 data fetch {name} --corpus FOLDER, and name the folder")
    known = json.loads((corpus / CORPUS).read_text(encoding="utf-8"))
    if name not in known["packages"]:
        raise FileNotFoundError(f"{corpus}: {name} is not there; qwen2 data fetch {name} --corpus {corpus}")
    entry = known["packages"][name]
    path = (corpus / entry["file"]).absolute()
    if not path.is_file() or path.stat().st_size != entry["file_bytes"]:
        raise ValueError(f"{path}: is not what {CORPUS} says: cut short or altered; qwen2 data fetch {name} --corpus {corpus}")
    package = PACKAGES[name]
    assert package.role != "chat"  # which a recipe refuses
    assert package.role != "preferences"
    return Input(str(path), "jsonl", replace(source, role=package.role, licence=package.licence), path.stat().st_size)


def _of_path(source: Source, base: Path) -> list[Input]:
    place = base / source.path
    if place.is_dir():
        ending = {name for name, form in FORMATS.items() if not source.format or form == source.format}
        paths = [path for path in place.rglob("*") if path.is_file() and ending & set(path.suffixes)]
    else:
        paths = [Path(path) for path in glob.glob(str(place), recursive=True) if Path(path).is_file()]
    if not paths:
        raise FileNotFoundError(f"source {source.label}: {place}: no files there")
    if source.role == "evaluation" and source.language == DETECT:
        source = replace(source, language="")
    return [Input(str(path.absolute()), format_of(path, source), source, path.stat().st_size) for path in sorted(paths)]
