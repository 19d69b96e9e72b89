"""What our steps of a datatrove pipeline share: a filter that counts what it keeps by language and source, and says what it drops.

Each task of each step writes its counts beside the others'; `report.py` adds them up. Samples of what was dropped are chosen by
the document's hash, so that they are the same in every run.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from qwen2.data.units import Text

logger.disable("datatrove")  # its words for every task; what it would say of an error is raised anyway
SAMPLES = 3  # of each reason and task
SHOWN = 300  # characters of a sample
ANALYSED = "_text"  # key of a document's metadata that lives as long as the pipeline; such keys are not written
DETECTED = "_detected"  # another: how likely the language is, where it is not a declared one
UNKNOWN = "?"  # in a language's place


def analysed(document: Document) -> Text:
    """The document's text as units, worked out once for all steps of a pipeline."""
    known = document.metadata.get(ANALYSED)
    if known is None or known.text is not document.text:
        known = document.metadata[ANALYSED] = Text(document.text)
    return known


def written(_: object, document: Document) -> dict[str, Any]:
    """A document as a line of JSON."""
    return {
        "id": document.id,
        "text": document.text,
        "metadata": {key: value for key, value in document.metadata.items() if not key.startswith("_")},
    }


class Tally:
    """Documents and bytes by (language, source, outcome), samples of what was dropped, and files that broke off with the reason."""

    def __init__(self) -> None:
        self.documents: Counter[tuple[str, str, str]] = Counter()
        self.bytes: Counter[tuple[str, str, str]] = Counter()
        self.samples: dict[str, list[tuple[str, str, str]]] = {}
        self.files: dict[str, str] = {}

    def add(self, document: Document, outcome: str, sample: str | None = None) -> None:
        """Count one document; `sample` is the text to show, where one is to be shown."""
        key = (document.metadata.get("language") or UNKNOWN, document.metadata["source"], outcome)
        self.documents[key] += 1
        self.bytes[key] += len(document.text.encode("utf-8", "replace"))
        if sample is not None:
            rank = hashlib.blake2b(document.id.encode("utf-8", "replace"), digest_size=8).hexdigest()
            kept = self.samples.setdefault(outcome, [])
            kept.append((rank, document.id, sample[:SHOWN]))
            kept.sort()
            del kept[SAMPLES:]

    def write(self, folder: Any, step: str, part: int | str) -> None:
        """Into a datatrove folder, as one part of a step's counts: a task's number, or a name."""
        rows = [[*key, count, self.bytes[key]] for key, count in sorted(self.documents.items())]
        with folder.open(f"{step}/{part:05d}.json" if isinstance(part, int) else f"{step}/{part}.json", "wt") as file:
            json.dump({"rows": rows, "samples": self.samples, "files": self.files}, file, ensure_ascii=False)


KEPT = "kept"


class CountedFilter(PipelineStep):
    """A filter: `look` returns None where a document stays as it may have been changed, else the reason why it goes."""

    type = "FILTER"

    def __init__(self, counts: str) -> None:
        super().__init__()
        self.counts = get_datafolder(counts)
        self.tally = Tally()

    def begin(self, rank: int) -> None:
        """Called once, before the first document of a task."""

    def concerns(self, document: Document) -> bool:
        """Whether the step looks at a document; others stay as they are."""
        return bool(document.metadata["role"] == "train")

    @abstractmethod
    def look(self, document: Document) -> str | None:
        """The reason to drop a document that the step concerns, or None."""

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Documents that stay."""
        self.begin(rank)
        for document in data:
            with self.track_time():
                reason = self.look(document) if self.concerns(document) else None
                self.tally.add(document, reason or KEPT, document.text if reason else None)
            self.stat_update("kept" if reason is None else "dropped")
            if reason is None:
                yield document
        self.tally.write(self.counts, self.name, rank)
