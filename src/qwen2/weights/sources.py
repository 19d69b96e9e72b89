"""Where files come from, in the order in which they are tried: a local path, the hubs, the package index.

A source says whether it could have an entry (`has`), lists its files (`files`) and appends the bytes of one (`fetch`). A
ConnectionError means that the source does not have it or cannot be reached, a ValueError that it sent something else: both go on
to the next source, and when none is left, one line names them all with their reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from qwen2.config import ModelConfig
from qwen2.weights.hub import hugging_face, modelscope
from qwen2.weights.package_index import PackageIndex
from qwen2.weights.partial import CHUNK, file_digest
from qwen2.weights.registry import File, shape_of

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
        self._check_shape(entry, wanted)
        return tuple(File(path.name, path.stat().st_size, file_digest(path).hexdigest()) for path in wanted)

    def _check_shape(self, entry: Entry, files: Sequence[Path]) -> None:
        """Another model's files are refused before they are copied: by their counts, as far as the released shape is known."""
        released = shape_of(entry)
        if released is None:
            return
        held = _config_of(files)
        names = ["layers", "hidden", "heads", "kv_heads", "ffn", "vocab"]
        names += [] if files[0].suffix == ".gguf" else ["tied"]  # GGUF files may hold a tied matrix twice
        for name in names:
            if getattr(held, name) != getattr(released, name):
                raise ValueError(f"is another model: {name} {getattr(held, name)}, and {entry.name} has {getattr(released, name)}")

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


def _config_of(files: Sequence[Path]) -> ModelConfig:
    """What the header or config.json among the files says."""
    from qwen2.weights.gguf import GGUFFile
    from qwen2.weights.json_object import read_json

    if files[0].suffix == ".gguf":
        with GGUFFile.open(files[0]) as file:
            return ModelConfig.from_gguf(file.metadata, {name: info.shape for name, info in file.tensors.items()})
    return ModelConfig.from_hf(read_json(files[0].parent / "config.json"))


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
