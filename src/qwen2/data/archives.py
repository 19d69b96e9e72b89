"""The files in a package's archive, one after the other, in memory: zip files and wheels, tar.gz, and Debian's packages.

A .deb is an ar file (Debian's deb(5)) whose member data.tar holds the files, compressed by gzip, xz, bzip2, Zstandard or not at all.
Nothing is installed, no code of a package is run, and no program of Debian's is needed.

    for name, size, read in members(Path("fortunes-de_0.35-1_all.deb")): ...

Left out: links and special files, which hold no text.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tarfile import InvalidHeaderError, ReadError, TruncatedHeaderError  # type: ignore[attr-defined]
from typing import Any

BROKEN = (  # of an archive cut short or altered
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError,
)  # fmt: skip
Member = tuple[str, int, Callable[[], bytes]]  # name, size, and a call that reads it
_AR, _AR_ENTRY = b"!<arch>\n", 60  # what an ar file begins with, and the bytes of an entry's header


def members(path: Path) -> Iterator[Member]:
    """The files of an archive in its order. ValueError where it is cut short, altered or no archive."""
    try:
        with open(path, "rb") as file:
            if path.suffix in (".whl", ".zip"):
                with zipfile.ZipFile(file) as archive:
                    for info in archive.infolist():
                        yield info.filename, info.file_size, _reading(archive.read, info, path)
            elif path.suffix == ".deb":
                yield from _of_tar(_data_of_deb(file), path)
            else:
                yield from _of_tar(gzip.GzipFile(fileobj=file), path)  # tarfile's own reading notices neither a cut nor a wrong sum
    except BROKEN as error:
        raise _broken(path, error) from None


def _of_tar(file: Any, path: Path) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_Entry) as archive:
        for info in archive:
            if info.isfile():
                yield info.name, info.size, _reading(lambda info: (archive.extractfile(info) or io.BytesIO()).read(), info, path)
    while file.read(2**20):  # to the compression's end, where its sum stands
        pass


class _Entry(tarfile.TarInfo):
    """A tar file's entry. Where tarfile takes a damaged header for the archive's end, this is an error."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except (InvalidHeaderError, TruncatedHeaderError) as error:
            raise ReadError(str(error)) from None


def _reading(read: Callable[[Any], bytes], info: Any, path: Path) -> Callable[[], bytes]:
    def call() -> bytes:
        try:
            return read(info)
        except BROKEN as error:
            raise _broken(path, error) from None

    return call


def _broken(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"{path}: cut short or no archive ({error}); remove it and fetch again")


class _Part(io.RawIOBase):
    """The next `left` bytes of a file, as a file."""

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(min(len(buffer), self.left))
        if self.left and len(buffer) and not data:
            raise EOFError("ends within a member")
        self.left -= len(data)
        buffer[: len(data)] = data
        return len(data)


def _data_of_deb(file: Any) -> Any:
    """The tar file in a .deb, as a stream."""
    if file.read(len(_AR)) != _AR:
        raise EOFError("does not begin as a .deb does")
    while header := file.read(_AR_ENTRY):
        if len(header) < _AR_ENTRY or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
            raise EOFError("ends within a header, or has an altered one")
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return _unpacked(io.BufferedReader(_Part(file, size)), name)
        file.seek(size + size % 2, io.SEEK_CUR)
    raise EOFError("holds no data.tar")


def _unpacked(part: Any, name: str) -> Any:
    ending = name.removeprefix("data.tar")
    if ending == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(part, "r"), "zstd")
    opened: dict[str, Callable[[Any], Any]] = {
        "": lambda part: part, ".gz": lambda part: gzip.GzipFile(fileobj=part), ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile,
        ".lzma": lzma.LZMAFile,
    }  # fmt: skip
    if ending not in opened:
        raise EOFError(f"{name}: a compression that is not known")
    return opened[ending](part)
