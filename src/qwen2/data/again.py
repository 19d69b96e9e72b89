"""Shards made again from their manifest: where its inputs lie now, and whether they are what they were.

A manifest holds the recipe, the sha256 of each input, the versions of the libraries that decide bytes, the packages that were
missing, and in `places` the folders that its files are named from: the recipe's (`base`) and the corpus, each relative to the
manifest's own folder and absolute, so that all may move together, or the shards alone.

Left out: getting inputs back (`qwen2 data fetch`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2.data.fetch import CORPUS
from qwen2.data.recipe import Recipe, built_in
from qwen2.data.shards import sha256_of

Recorded = Mapping[str, Any]  # an input as a manifest has it: source, file, sha256


def places_of(recipe: Recipe, base: Path, corpus: Path | None, manifest: Path) -> dict[str, dict[str, str]]:
    """The folders that inputs are named from, as a manifest in the folder `manifest` holds them; those alone that the recipe uses."""
    used = {
        "base": base if any(source.path for source in recipe.sources) else None,
        "corpus": corpus if any(source.package for source in recipe.sources) else None,
    }
    there = {name: os.path.abspath(folder) for name, folder in used.items() if folder is not None}
    return {
        name: {"relative": Path(os.path.relpath(folder, manifest)).as_posix(), "absolute": Path(folder).as_posix()}
        for name, folder in there.items()
    }


@dataclass(frozen=True)
class Again:
    """A manifest of shards or of text, to be made again."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def of(cls, name: str | Path) -> Again | None:
        """None where this is a recipe and no manifest. ValueError where a manifest's inputs are not as they are written."""
        path = Path(name)
        if str(name) in built_in() or not path.is_file():
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or not isinstance(value.get("recipe"), dict) or "inputs" not in value:
            return None
        inputs, keys = value["inputs"], {"source", "file", "sha256"}
        if not isinstance(inputs, list) or not all(isinstance(one, dict) and one.keys() == keys for one in inputs):
            raise ValueError(f"{path}: inputs: not a list of {', '.join(sorted(keys))}")
        return cls(path, value)

    @property
    def missing(self) -> dict[str, str]:
        """Packages that the shards were made without, and why: they are left out again."""
        return {one["package"]: one["why"] for one in self.manifest.get("missing", [])}

    def base(self, recipe: Recipe) -> Path:
        """The folder that the recipe's paths start from: where most of the inputs are. FileNotFoundError where there is none of them."""
        labels = {source.label for source in recipe.sources if source.path and not Path(source.path).is_absolute()}
        files = [one["file"] for one in self.manifest["inputs"] if one["source"] in labels]
        looked = [*self._places("base"), self.path.absolute().parent]
        found = {folder: sum((folder / file).is_file() for file in files) for folder in looked}
        if files and not any(found.values()):
            where = ", ".join(map(str, found))
            raise FileNotFoundError(f"{self.path}: its inputs, {files[0]} among them, are in none of {where}; bring them back")
        return max(found, key=lambda folder: found[folder])

    def corpus(self, default: Path) -> Path:
        """The corpus that the shards were made from, or the default where it is not there any more."""
        return next((folder for folder in self._places("corpus") if (folder / CORPUS).is_file()), default)

    def _places(self, name: str) -> list[Path]:
        place = self.manifest.get("places", {}).get(name)
        return [] if place is None else [Path(os.path.abspath(self.path.parent / place["relative"])), Path(place["absolute"])]

    def tokenizer(self) -> Path | None:
        """The copy of the tokenizer beside the shards, where it is there and theirs."""
        folder = self.path.parent / "tokenizer"
        file, info = folder / "tokenizer.json", self.manifest.get("tokenizer")
        return folder if info is not None and file.is_file() and sha256_of(file) == info["sha256"] else None

    def check(self, inputs: Iterable[Recorded]) -> None:
        """ValueError naming an input that was changed, is gone, or was not there."""
        recorded, found = _hashes(self.manifest["inputs"]), _hashes(inputs)
        other = "bring it back as it was, or prepare other shards from a recipe"
        for (source, file), digests in recorded.items():
            now = found.get((source, file))
            if now is None:
                raise ValueError(f"source {source}: {file}: an input in {self.path} that is gone; {other}")
            if now != digests:
                raise ValueError(f"source {source}: {file}: its sha256 is not the one in {self.path}: it was changed since; {other}")
        for source, file in found.keys() - recorded.keys():
            raise ValueError(f"source {source}: {file}: no input in {self.path}; move it away, or prepare other shards from a recipe")

    def other_libraries(self, now: Mapping[str, str]) -> list[str]:
        """A warning for each library that is of another version than the shards were made with."""
        then = self.manifest.get("libraries", {})
        return [
            f"warning: {name} {then[name]} made {self.path}, {version} is installed: the shards may differ"
            for name, version in now.items()
            if then.get(name, version) != version
        ]


def _hashes(inputs: Iterable[Recorded]) -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for one in inputs:
        found.setdefault((one["source"], one["file"]), set()).add(one["sha256"])
    return found
