"""Copies: whole documents and paragraphs alike but for case, punctuation and spacing, and near copies by MinHash.

Exact copies are found by hashes of a text's units: every task writes its hashes, one step sorts them all and keeps the first of
each, and none of a held-out document. Near copies are found by datatrove's MinHash stages (Broder 1997; 14 buckets of 8 hashes:
documents that share 0.9 of their runs of five units are found 9,996 times in 10,000, those that share half once in 20), with our
units for its words, which need no dictionaries, and with multiplications modulo 2^64 in place of 2^61 - 1, which the units' hashes
allow. Of a cluster the longest document stays, of those as long the first, where datatrove keeps any: the one that the exact step
keeps is then never dropped for its copy. Pieces of longer documents are marked by `cuts.py`, after both.

Paragraphs come last: of each the first stays among documents that are no copies themselves. A document that is left with less than
half of its bytes goes as a whole.

Left out: copies across languages. A paragraph whose first place is in a document that goes for another reason is lost with it.
The exact step holds 8 bytes a paragraph in memory, all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from qwen2.data.steps import CountedFilter, analysed
from qwen2.data.units import Hashes, Text

REMOVED, CUT = ".remove", ".cut"  # endings of the files that say which documents of a task are near copies, and cut copies
COUNTS = ".counts"  # of those that say how many different runs of units each document has
SOME = 4096  # shingles hashed at a time: a table of 112 columns then fits into the processor's cache


def near_config(shingle: int, seed: int) -> MinhashConfig:
    """How near copies are found; all stages must be given the same."""
    return MinhashConfig(n_grams=shingle, num_buckets=14, hashes_per_bucket=8, seed=seed + 1, hash_config=HashConfig(64, "sha1"))


def flags_of(folder: Any, name: str, kind: Any) -> Any:
    """What an earlier step wrote for a task. ValueError where it is not there: without it copies would stay, and nobody would know."""
    if not folder.isfile(name):
        work = Path(folder.path).parent
        raise ValueError(f"{folder.path}/{name}: gone, though the step that writes it is finished; remove {work} and prepare again")
    return np.frombuffer(folder.open(name, "rb").read(), kind)


# ---------------------------------------------------------------- exact copies

COPIES = (None, "copy of a document", "copy of a held-out document")  # by flag: why a document goes
AGAIN, HELD_OUT = 1, 2


def paragraphs(text: Text, least_bytes: int) -> tuple[list[int], Any]:
    """The lines that are long enough to count as paragraphs, and their hashes."""
    numbers, hashes = text.line_hashes()
    lines = text.text.split("\n")
    long = [len(lines[number].encode("utf-8", "replace")) >= least_bytes for number in numbers]
    return [int(number) for number, is_long in zip(numbers, long, strict=True) if is_long], hashes[np.array(long, bool)]


class ExactSignatures(PipelineStep):
    """Writes the hashes of documents and paragraphs, passes everything on."""

    name = "exact signatures"
    type = "DEDUP"

    def __init__(self, folder: str, least_bytes: int) -> None:
        super().__init__()
        self.folder, self.least_bytes = get_datafolder(folder), least_bytes

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Each document's hash, those of held-out ones apart, a training document's paragraphs', and its number and how many they are."""
        whole: list[Hashes] = []
        held: list[Hashes] = []
        lines: list[Hashes] = []
        places: list[tuple[int, int]] = []
        for number, document in enumerate(data):
            text = analysed(document)
            is_training = document.metadata["role"] == "train"
            (whole if is_training else held).append(np.array([text.whole_hash()], np.uint64))
            if is_training:
                lines.append(paragraphs(text, self.least_bytes)[1])
                places.append((number, len(lines[-1])))
            yield document
        with self.folder.open(f"{rank:05d}.places", "wb") as file:
            file.write(np.array(places, np.uint64).tobytes())
        for name, hashes in (("documents", whole), ("held-out", held), ("paragraphs", lines)):
            with self.folder.open(f"{name}-{rank:05d}.u64", "wb") as file:
                file.write(np.concatenate([np.empty(0, np.uint64), *hashes]).tobytes())


class ExactCopies(PipelineStep):
    """From all hashes of documents to flags: which stood somewhere before, which are held out. One task."""

    name = "exact copies"
    type = "DEDUP"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = get_datafolder(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """First come, first kept, in the order of tasks."""
        held_out = np.concatenate([np.empty(0, np.uint64), *hashes_in(self.folder, "held-out").values()])
        parts = hashes_in(self.folder, "documents")
        hashes = np.concatenate(list(parts.values()))
        again = np.where(np.isin(hashes, held_out), HELD_OUT, np.where(repeated(hashes), AGAIN, 0)).astype(np.uint8)
        write_flags(self.folder, parts, again)


class ExactParagraphs(PipelineStep):
    """From all hashes of paragraphs to flags: which stood before in a document that is no copy. One task, after those that find copies."""

    name = "exact paragraphs"
    type = "DEDUP"

    def __init__(self, folder: str, near: str | None) -> None:
        super().__init__()
        self.folder, self.near = get_datafolder(folder), None if near is None else get_datafolder(near)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """First come, first kept, in the order of tasks. Documents that are copies have no flags: they go as they are."""
        parts = hashes_in(self.folder, "paragraphs")
        stays = np.concatenate([self._stays(task) for task in range(len(parts))])
        hashes = np.concatenate(list(parts.values()))
        again = np.zeros(len(hashes), np.uint8)
        again[stays] = repeated(hashes[stays])
        write_flags(self.folder, parts, again)

    def _stays(self, task: int) -> Any:
        """For each paragraph whether its document does."""
        places = flags_of(self.folder, f"{task:05d}.places", np.uint64).reshape(-1, 2)
        gone = [copies_in(self.folder, task)]
        if self.near is not None:
            gone += [flags_of(self.near, f"{task:06d}{ending}", "<u4").astype(np.uint64) for ending in (REMOVED, CUT)]
        return np.repeat(~np.isin(places[:, 0], np.concatenate(gone)), places[:, 1].astype(np.int64))


def repeated(hashes: Hashes) -> Any:
    """For each hash whether it stood before."""
    again = np.ones(len(hashes), bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again


def copies_in(folder: Any, task: int) -> Hashes:
    """The numbers of a task's documents that go as exact copies; none where the recipe has no such step."""
    if not folder.isfile(f"{task:05d}.places"):
        return np.empty(0, np.uint64)
    return flags_of(folder, f"{task:05d}.places", np.uint64).reshape(-1, 2)[
        flags_of(folder, f"documents-{task:05d}.again", np.uint8) != 0, 0
    ]


def hashes_in(folder: Any, name: str) -> dict[str, Hashes]:
    """By file, in the order of tasks."""
    places = sorted(folder.list_files(glob_pattern=f"{name}-*.u64"))
    return {place: np.frombuffer(folder.open(place, "rb").read(), np.uint64) for place in places}


def write_flags(folder: Any, parts: dict[str, Hashes], flags: Any) -> None:
    """Beside the hashes, a file for each of theirs."""
    for place, part in zip(parts, np.split(flags, np.cumsum([len(part) for part in parts.values()])[:-1]), strict=True):
        with folder.open(place.replace(".u64", ".again"), "wb") as file:
            file.write(part.tobytes())


class ExactFilter(CountedFilter):
    """Drops documents that stood somewhere before, takes such paragraphs out of the others, and drops those that it leaves little of."""

    name = "exact"

    def __init__(self, folder: str, least_bytes: int, recipe: Any, counts: str) -> None:
        super().__init__(counts)
        self.folder, self.least_bytes, self.recipe = get_datafolder(folder), least_bytes, recipe

    def begin(self, rank: int) -> None:
        """Read this task's flags."""
        self.documents = flags_of(self.folder, f"documents-{rank:05d}.again", np.uint8)
        self.paragraphs = flags_of(self.folder, f"paragraphs-{rank:05d}.again", bool)
        self.document = self.paragraph = 0

    def look(self, document: Document) -> str | None:
        """Documents come in the order of ExactSignatures."""
        numbers, _ = paragraphs(analysed(document), self.least_bytes)
        flags = self.paragraphs[self.paragraph : self.paragraph + len(numbers)]
        reason = COPIES[self.documents[self.document]]
        self.document += 1
        self.paragraph += len(numbers)
        if reason is not None:
            return reason
        if flags.any():
            gone = {number for number, flag in zip(numbers, flags, strict=True) if flag}
            lines = document.text.split("\n")
            text = "\n".join(line for number, line in enumerate(lines) if number not in gone)
            size, left = (len(one.encode("utf-8", "replace")) for one in (document.text, text))
            if left < self.recipe.limits(document.metadata["language"]).least_bytes:
                return "copied paragraphs"
            if 2 * left < size:
                return "more than half copied"
            document.text = text.strip("\n")
        return None


# ---------------------------------------------------------------- near copies


class Units(WordTokenizer):
    """Our units in the place of datatrove's words; its stages ask for nothing else once shingles are ours."""

    def word_tokenize(self, text: str) -> list[str]:
        """Units as text."""
        return list(map(str, Text(text).units.tolist()))

    def sent_tokenize(self, text: str) -> list[str]:
        """Lines."""
        return text.split("\n")

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """The text as one span."""
        return [(0, len(text))]


class NearSignatures(MinhashDedupSignature):
    """datatrove's first stage with our shingles; the last step of a pipeline, as it passes nothing on."""

    def __init__(self, folder: str, config: MinhashConfig) -> None:
        super().__init__(folder, config, language=Units())
        generator = np.random.Generator(np.random.PCG64(config.seed))
        self.factors, self.terms = generator.integers(0, 2**64, (2, 1, self.num_hashes), dtype=np.uint64)
        self.factors |= np.uint64(1)

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Any:
        """Signatures of all documents; those of other splits than training get none, but keep their number."""
        return super().run((self._as_input(document) for document in data), rank, world_size)

    def _as_input(self, document: Document) -> Document:
        self.shingles = analysed(document).distinct_shingles(self.config.n_grams) if document.metadata["role"] == "train" else None
        return document

    def get_shingles(self, text: str) -> Any:
        """Of the document that was just handed in."""
        return np.empty((0, 1), np.uint64) if self.shingles is None else self.shingles.reshape(-1, 1)

    def get_signature(self, shingles: Any) -> list[list[int]]:
        """The least values under each hash function, as lists by bucket."""
        least = np.full(self.num_hashes, np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(shingles), SOME):
            least = np.minimum(least, (shingles[start : start + SOME] * self.factors + self.terms).min(axis=0))
        return (least >> np.uint64(3)).reshape(self.config.num_buckets, -1).tolist()


class NearClusters(PipelineStep):
    """From pairs of near copies (datatrove's second stage) to what goes: all of a cluster but its longest. One task."""

    name = "near clusters"
    type = "DEDUP"

    def __init__(self, pairs: str, runs: str, folder: str, tasks: int) -> None:
        super().__init__()
        self.pairs, self.runs, self.folder, self.tasks = get_datafolder(pairs), get_datafolder(runs), get_datafolder(folder), tasks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Union by the longest, of those as long by the first; a pair is (task, document, task, document)."""
        sizes = [flags_of(self.runs, f"{task:05d}{COUNTS}", np.uint32) for task in range(self.tasks)]
        parent: dict[int, int] = {}

        def root(node: int) -> int:
            while parent.setdefault(node, node) != node:
                parent[node] = node = parent[parent[node]]
            return node

        for place in sorted(self.pairs.list_files(glob_pattern="*.dups")):
            pairs = np.frombuffer(self.pairs.open(place, "rb").read(), "<u4").reshape(-1, 2, 2).astype(np.int64)
            for one, other in ((pairs[:, :, 0] << 32) + pairs[:, :, 1]).tolist():
                stays, goes = sorted((root(one), root(other)), key=lambda node: (-int(sizes[node >> 32][node & 0xFFFFFFFF]), node))
                parent[goes] = stays
        gone: dict[int, list[int]] = {task: [] for task in range(self.tasks)}  # one with nothing to drop has a file that says so
        for node in sorted(parent):
            if root(node) != node:
                gone[node >> 32].append(node & 0xFFFFFFFF)
        for task, documents in gone.items():
            with self.folder.open(f"{task:06d}{REMOVED}", "wb") as file:
                file.write(np.array(documents, "<u4").tobytes())


class NearFilter(CountedFilter):
    """Drops what NearClusters and FindCuts (`cuts.py`) marked."""

    name = "near"

    def __init__(self, folder: str, counts: str) -> None:
        super().__init__(counts)
        self.folder = get_datafolder(folder)

    def begin(self, rank: int) -> None:
        """Read which documents of the task go."""
        self.near, self.cut = (set(flags_of(self.folder, f"{rank:06d}{ending}", "<u4").tolist()) for ending in (REMOVED, CUT))

    def look(self, document: Document) -> str | None:
        """By the document's number in its task, counted before any was dropped."""
        number = document.metadata["_number"]
        return "near copy" if number in self.near else "part of a longer document" if number in self.cut else None
