"""A file of JSON lines that survives its writer: a line is on the disk before the next one is begun, a torn one is cut off.

with Journal(path) as journal: journal.append({"key": "a"})
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Journal:
    """Records in the order in which they were appended. `torn` is how many bytes a killed writer left behind, which are gone now.

    Raises ValueError where a line that was finished is no JSON object: somebody else wrote into the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.torn = path, 0
        self.records: list[dict[str, Any]] = []
        whole = self._read()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if self.torn:
            os.truncate(path, whole)
            os.fsync(self._file)

    def _read(self) -> int:
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        self.torn = len(data) - whole
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"{self.path}:{number}: damaged; cut this line out to go on without it, its prompt is then asked again")
            self.records.append(record)
        return whole

    def append(self, record: dict[str, Any]) -> None:
        """Write a record; it is safe when this returns."""
        line = json.dumps(record, ensure_ascii=True).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)
        self.records.append(record)

    def rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        """Other records in place of these, all or none of them."""
        listed = list(records)
        write_lines(self.path, listed)
        os.close(self._file)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.records = listed

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines under a temporary name, then renamed."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(draft, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
