"""Cut copies: documents that are a piece of a longer one, wherever it was cut, in the middle of a line too.

A document goes when at least 0.8 of its runs of units (the shingles of the near step, each counted once) stand in one longer
document that stays. The longer one is that with more such runs, of two alike the first. What goes as an exact or near copy is in no
comparison, so that nothing goes for the sake of a document that goes itself.

What is bounded, and how:
1) disk: runs are 64-bit hashes; of inputs of more than 2 GiB only those that are multiples of a power of two are kept, so that they
   are as many as of 2 GiB (12 bytes each; documents with fewer than 16 of them are then not judged);
2) memory: each task sorts its hashes; they are joined by one task, a range of values after the other, 4 million at a time;
3) pairs: of a run that many hold only the 16 longest holders count, so no run makes more than 16 pairs with a document; after each
   range the pairs are dropped that cannot reach 0.8 any more, which are most once a fifth of the values is done.

So a menu that stands in hundreds of pages costs little, and a page that shares no more than it with another stays. Left out: pieces
put together from several documents (the exact step takes out whole paragraphs), and cut copies of changed text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep

from qwen2.data.duplicates import COUNTS, CUT, REMOVED, copies_in, flags_of
from qwen2.data.steps import analysed
from qwen2.data.units import Hashes

SHARE = 0.8  # of a document's runs that stand in a longer one
HOLDERS = 16  # of a run, the longest ones
WHOLE_BYTES = 2**31  # of inputs, whose runs are all kept
FEWEST = 16  # runs of a document that is judged by some of them
BITS = 12  # hashes are read by their first bits
AT_ONCE = 2**22  # hashes in memory, or what shares its first bits

Pairs = tuple[Any, Any]  # (document, longer document) as one integer each, and how many runs they share


def one_of(paths: Iterable[str]) -> int:
    """Of how many runs one is kept for inputs of this size: a power of two."""
    size, kept = sum(os.path.getsize(path) for path in paths), 1
    while size > kept * WHOLE_BYTES:
        kept *= 2
    return kept


class CutSignatures(PipelineStep):
    """Writes the runs of all training documents of a task, sorted, with the document of each; passes everything on."""

    name = "cut signatures"
    type = "DEDUP"

    def __init__(self, folder: str, shingle: int, kept: int) -> None:
        super().__init__()
        self.folder, self.shingle, self.kept = get_datafolder(folder), shingle, kept

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Documents of other splits have none, but keep their number."""
        found: list[Hashes] = []
        for document in data:
            runs = analysed(document).distinct_shingles(self.shingle) if document.metadata["role"] == "train" else np.empty(0, np.uint64)
            found.append(runs if self.kept == 1 else runs[runs & np.uint64(self.kept - 1) == 0])
            yield document
        counts = np.array([len(runs) for runs in found], np.uint32)
        runs = np.concatenate([np.empty(0, np.uint64), *found])
        ordered = np.argsort(runs)
        runs, owners = runs[ordered], np.repeat(np.arange(len(found), dtype=np.uint32), counts)[ordered]
        ends = np.searchsorted(runs >> np.uint64(64 - BITS), np.arange(2**BITS, dtype=np.uint64), "right").astype(np.uint64)
        for kind, values in ((".runs", runs), (".owners", owners), (".ends", ends), (COUNTS, counts)):
            with self.folder.open(f"{rank:05d}{kind}", "wb") as file:
                file.write(values.tobytes())


class FindCuts(PipelineStep):
    """From the runs of all tasks to which documents go. One task."""

    name = "find cuts"
    type = "DEDUP"

    def __init__(self, runs: str, exact: str, near: str, tasks: int, kept: int) -> None:
        super().__init__()
        self.runs, self.exact, self.near, self.tasks = get_datafolder(runs), get_datafolder(exact), get_datafolder(near), tasks
        self.least = FEWEST if kept > 1 else 1

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Longest first, so that whether the longer one stays is known before; the order of tasks decides among those as long."""
        counts = [flags_of(self.runs, f"{task:05d}{COUNTS}", np.uint32).astype(np.int64) for task in range(self.tasks)]
        starts = np.cumsum([0, *map(len, counts)])
        sizes = np.concatenate(counts)
        for task, start in enumerate(starts[:-1].tolist()):
            gone = np.append(copies_in(self.exact, task), flags_of(self.near, f"{task:06d}{REMOVED}", "<u4")).astype(np.int64)
            sizes[start + gone] = 0
        longest = np.argsort(-sizes, kind="stable")
        cut = np.zeros(len(sizes), bool)
        for pair in self._pairs(sizes, starts, longest).tolist():
            if not cut[longest[pair & 0xFFFFFFFF]]:
                cut[longest[pair >> 32]] = True
        for task, flags in enumerate(np.split(cut, starts[1:-1])):
            with self.near.open(f"{task:06d}{CUT}", "wb") as file:
                file.write(np.flatnonzero(flags).astype("<u4").tobytes())

    def _pairs(self, sizes: Any, starts: Any, longest: Any) -> Any:
        """(document, longer one that holds enough of it), both as places in the order of sizes, sorted."""
        place = np.empty(len(sizes), np.int64)
        place[longest] = np.arange(len(sizes))
        wanted = np.maximum(self.least, np.ceil(SHARE * sizes[longest])).astype(np.int64)
        left = sizes[longest].copy()  # runs of each that are still to come
        pairs: Pairs = (np.empty(0, np.int64), np.empty(0, np.int64))
        for runs, owners in self._ranges(starts):
            stays = sizes[owners] > 0
            runs, places = runs[stays], place[owners[stays]]
            left -= np.bincount(places, minlength=len(left))
            both, shared = added(pairs, sharing(runs, places))
            of = both >> 32
            likely = shared + left[of] >= wanted[of]
            pairs = both[likely], shared[likely]
        return pairs[0]

    def _ranges(self, starts: Any) -> Iterator[tuple[Hashes, Any]]:
        """All runs that share their first bits, and the document of each; as many first bits at a time as memory takes."""
        ends = np.stack([np.append(0, flags_of(self.runs, f"{task:05d}.ends", np.uint64).astype(np.int64)) for task in range(self.tasks)])
        total, first = ends.sum(axis=0), 0
        while first < 2**BITS:
            last = max(first + 1, int(np.searchsorted(total, total[first] + AT_ONCE, "right")) - 1)
            runs, owners = [], []
            for task in range(self.tasks):
                start, count = int(ends[task, first]), int(ends[task, last] - ends[task, first])
                where = Path(self.runs.path)
                runs.append(np.fromfile(where / f"{task:05d}.runs", np.uint64, count, offset=start * 8))
                owners.append(np.fromfile(where / f"{task:05d}.owners", np.uint32, count, offset=start * 4).astype(np.int64) + starts[task])
            yield np.concatenate(runs), np.concatenate(owners)
            first = last


def sharing(runs: Hashes, places: Any) -> Pairs:
    """Pairs of documents with a run in common: for each holder of a run with each of the HOLDERS longest, those before it."""
    ordered = np.argsort(runs)
    same = runs[ordered[1:]] == runs[ordered[:-1]]
    shared = ordered[np.append(same, False) | np.append(False, same)] if len(runs) else ordered
    shared = shared[np.lexsort((places[shared], runs[shared]))]
    runs, places, here = runs[shared], places[shared], np.arange(len(shared))
    first = np.maximum.accumulate(np.where(np.append(True, runs[1:] != runs[:-1])[: len(runs)], here, 0))
    found = [np.empty(0, np.int64)]
    for number in range(HOLDERS):
        later = np.flatnonzero(first + number < here)
        found.append(places[later] << 32 | places[first[later] + number])
    return np.unique(np.concatenate(found), return_counts=True)


def added(one: Pairs, other: Pairs) -> Pairs:
    """The counts of both."""
    pairs, which = np.unique(np.concatenate([one[0], other[0]]), return_inverse=True)
    return pairs, np.bincount(which, np.concatenate([one[1], other[1]]), minlength=len(pairs)).astype(np.int64)
