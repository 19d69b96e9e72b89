"""From a package's archive to JSON lines of its text, as much of each language as is wanted, and its entry in corpus.json.

Manuals show English where nobody has translated them. Such lines are left out before bytes are counted: those that stand in the
English text too, which is in the same archive or in that of another package (`Package.english`), whose hash is in the entry.

Left out: downloads (`fetch.py`), and English that differs from the English text.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen2.data.archives import members
from qwen2.data.extract import EXTRACTION, EXTRACTORS, Texts
from qwen2.data.languages import LANGUAGES
from qwen2.data.packages import FOR_JOBS, PACKAGES, Package
from qwen2.data.shards import sha256_of

MEMBER_BYTES = 2**26  # of a file in a package; what is larger is skipped and counted


@dataclass(frozen=True)
class Archive:
    """A package's file, and the version that it is of."""

    path: Path
    version: str


@dataclass(frozen=True)
class Wanted:
    """A package, and how many bytes of text of each language are enough; 0: all."""

    package: Package
    most_bytes: int = 0


def write_texts(wanted: Wanted, archive: Archive, folder: Path, english: Archive | None = None) -> dict[str, Any]:
    """The documents of a package as JSON lines, and its entry in corpus.json. ValueError where no file of it matches.

    `english` is the archive of `package.english`, where that is another package.
    """
    package = wanted.package
    original = (english or archive) if package.english else None
    left_out = _english(package.english, original.path, sha256_of(original.path)) if original else frozenset[str]()
    place = folder / package.role / f"{package.name}.jsonl"
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(".partial")
    languages: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    with open(partial, "w", encoding="utf-8", newline="\n") as out:
        for language, text in _translated(_texts(package, archive.path, skipped), left_out, skipped):
            if wanted.most_bytes and sizes[language] >= wanted.most_bytes:
                skipped["enough of the language"] += 1
                if "language" in package.options:
                    break
                continue
            content = json.loads(text) if package.role in FOR_JOBS else {"text": text}
            line = {"id": f"{package.name}/{language}/{languages[language]}", **content, "language": language}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            languages[language] += 1
            sizes[language] += len(text.encode("utf-8"))
    if not languages:
        partial.unlink()
        raise ValueError(f"{package.name} {archive.version}: none of its files holds the text that the table names; it has changed")
    os.replace(partial, place)
    return {
        "kind": package.kind,
        "version": archive.version,
        "sha256": sha256_of(archive.path),
        "licence": package.licence,
        "role": package.role,
        "file": place.relative_to(folder).as_posix(),
        "extraction": EXTRACTION,
        "english": {"package": package.english, "version": original.version, "sha256": sha256_of(original.path)} if original else None,
        "file_bytes": place.stat().st_size,
        "sha256_text": sha256_of(place),
        "documents": languages.total(),
        "bytes": sizes.total(),
        "most_bytes": wanted.most_bytes,
        "languages": dict(sorted(languages.items())),
        "skipped": dict(sorted(skipped.items())),
    }


def _texts(package: Package, path: Path, skipped: Counter[str]) -> Texts:
    extract = EXTRACTORS[package.extract]
    for name, size, read in members(path):
        if not any(fnmatch.fnmatch(f"/{name}", f"*{pattern}") for pattern in package.members):
            continue
        if size > MEMBER_BYTES:
            skipped["file too large"] += 1
            continue
        data = read()
        try:
            for language, text in extract(name, data, package.options):
                if package.role != "evaluation" and language not in LANGUAGES:
                    skipped["language not among the 29"] += 1
                elif not text.strip():
                    skipped["empty"] += 1
                else:
                    yield language, text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold lone surrogates
        except (ValueError, KeyError, TypeError) as error:
            skipped[f"file not read: {type(error).__name__}"] += 1


def _translated(texts: Texts, english: frozenset[str], skipped: Counter[str]) -> Texts:
    """Texts in other languages without the lines that are among the English ones."""
    for language, text in texts:
        if language == "en" or not english:
            yield language, text
            continue
        lines = text.split("\n")
        own = [line for line in lines if line not in english]
        if len(own) < len(lines):
            skipped["line as in English"] += len(lines) - len(own)
        if own:
            yield language, "\n".join(own)
        else:
            skipped["nothing but lines as in English"] += 1


@lru_cache(maxsize=4)
def _english(name: str, path: Path, digest: str) -> frozenset[str]:
    """The English lines in a package's archive; `digest` is the archive's, so that another one of this name is read anew."""
    return frozenset(line for language, text in _texts(PACKAGES[name], path, Counter()) if language == "en" for line in text.split("\n"))
