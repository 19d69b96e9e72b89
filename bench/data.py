"""The data pipeline beside plain datatrove with its own equivalents of the same steps: documents a second and core, one process.

Ours is the whole chain up to clean text. Theirs is datatrove's JSON-lines reader, language filter (lid.176 put in, which its own
would download), Gopher repetition and quality filters, exact and sentence de-duplication, MinHash, n-gram decontamination,
personal data formatter and writer. Its words come from a regular expression, many times faster than the spaCy models that it
takes by default; a quality classifier it has none of, so that step is ours alone. The thresholds of its Gopher filters, made for English,
are so wide that as many documents as in ours reach the later steps. Both are fed the same documents, in turns, and judged by
the processor's seconds, start and loading of models included.

    python bench/data.py CORPUS [--rounds 3] [--megabytes 4]        # CORPUS: what `qwen2 data fetch quick` wrote
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
    SentDedupConfig,
    SentenceDedupFilter,
    SentenceDedupSignature,
    SentenceFindDedups,
)
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig, create_hash_func
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from qwen2.data.languages import LANGUAGES, _lid176, sample
from qwen2.data.prepare import prepare_text
from qwen2.data.recipe import Recipe, Source

HASH = HashConfig(64, "sha1")


class Words(WhitespaceTokenizer):
    """datatrove's sentences, words by one regular expression."""

    def word_tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)


class Language(BaseFilter):
    """datatrove's language filter with a model that needs no download."""

    name = "language"

    def filter(self, doc: Document) -> bool:
        found = _lid176().detect(sample(doc.text), k=1)[0]
        doc.metadata["language"] = found["lang"]
        return found["lang"] in LANGUAGES and found["score"] > 0.5


def whole(document: Document) -> str:
    return document.text


def index_items(items: list[str], folder: Path, config: NGramsDecontConfig) -> None:
    """The hashes that datatrove's indexer writes, without lighteval, which it reads tasks with."""
    folder.mkdir(parents=True)
    hashed, words = create_hash_func(HASH), Words()
    found = {
        hashed(" ".join(run))
        for item in items
        for run in ngrams(words.word_tokenize(simplify_text(item, config.norm_config)), config.n_grams)
    }
    (folder / "items.index.hashes").write_bytes(np.array(sorted(found), np.uint64).tobytes())


def theirs(folder: Path, items: list[str], out: Path) -> int:
    """Documents that are left."""

    def at(name: str) -> str:
        return str(out / name)

    def run(name: str, *steps: PipelineStep, tasks: int = 1) -> None:
        LocalPipelineExecutor(list(steps), tasks=tasks, workers=1, logging_dir=at(f"logs/{name}")).run()

    words = Words()
    exact = ExactDedupConfig(content_getter=whole, hash_config=HASH)
    sentences = SentDedupConfig(n_sentences=1, split_sentences=False, min_doc_words=0, min_num_sentences=0, hash_config=HASH)
    near = MinhashConfig(hash_config=HASH)
    decontamination = NGramsDecontConfig(n_grams=13, hash_config=HASH)
    NGramsDecontFilter._requires_dependencies = []
    index_items(items, out / "items", decontamination)
    quality = GopherQualityFilter(10, None, 0, 100, 1.0, None, None, 0.0, 0, language=words)
    runs = tuple((n, 10.0) for n in range(2, 5)), tuple((n, 10.0) for n in range(5, 11))
    repetition = GopherRepetitionFilter(top_n_grams=runs[0], dup_n_grams=runs[1], language=words)
    run(
        "one",
        JsonlReader(str(folder), glob_pattern="train.jsonl"),
        Language(),
        repetition,
        quality,
        JsonlWriter(at("a"), compression=None),
    )
    run("two", JsonlReader(at("a")), ExactDedupSignature(at("exact"), config=exact))
    run("three", ExactFindDedups(at("exact"), at("exact-found"), config=exact))
    run("four", JsonlReader(at("a")), ExactDedupFilter(at("exact-found"), config=exact), JsonlWriter(at("b"), compression=None))
    run("five", JsonlReader(at("b")), SentenceDedupSignature(at("lines"), config=sentences, language=words))
    run("six", SentenceFindDedups(at("lines"), at("lines-found"), config=sentences))
    run(
        "seven",
        JsonlReader(at("b")),
        SentenceDedupFilter(at("lines-found"), config=sentences, language=words),
        JsonlWriter(at("c"), compression=None),
    )
    run("eight", JsonlReader(at("c")), MinhashDedupSignature(at("signatures"), near, language=words))
    run("nine", MinhashDedupBuckets(at("signatures"), at("buckets"), config=near, lines_to_buffer=1000), tasks=near.num_buckets)
    run("ten", MinhashDedupCluster(at("buckets"), at("clusters"), config=near))
    run(
        "eleven",
        JsonlReader(at("c")),
        MinhashDedupFilter(at("clusters")),
        NGramsDecontFilter(at("items"), decontamination, language=words),
        PIIFormatter(),
        JsonlWriter(at("text"), compression=None),
    )
    return lines_in(out / "text")


def ours(folder: Path, items: list[str], out: Path) -> int:
    """Documents that are left."""
    sources = (Source(path="train.jsonl", language="detect"), Source(path="items.jsonl", role="evaluation"))
    prepare_text(Recipe("bench", sources, tasks=1), folder, None, out, say=lambda line: None)
    return lines_in(out / "text")


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def lines_in(folder: Path) -> int:
    return sum(len(rows_of(path)) for path in folder.glob("*.jsonl"))


def take(corpus: Path, folder: Path, most_bytes: int) -> tuple[int, list[str]]:
    """The same number of bytes of every language as a training file; the held-out text's lines as items."""
    share, taken, count = most_bytes // len(LANGUAGES), dict.fromkeys(LANGUAGES, 0), 0
    with open(folder / "train.jsonl", "w", encoding="utf-8") as out:
        for path in sorted((corpus / "train").glob("*.jsonl")):
            for row in rows_of(path):
                if taken[row["language"]] < share:
                    taken[row["language"]] += len(row["text"].encode())
                    out.write(json.dumps({"text": row["text"], "id": row["id"]}, ensure_ascii=False) + "\n")
                    count += 1
    held = sorted((corpus / "held-out").glob("*.jsonl"))
    items = [line for path in held for row in rows_of(path) for line in row["text"].split("\n")]
    (folder / "items.jsonl").write_text("".join(json.dumps({"text": item}) + "\n" for item in items), encoding="utf-8")
    return count, items


def measure(side: str, folder: Path) -> dict[str, Any]:
    """One run in this process: seconds on the clock and of the processor, documents left."""
    items = [row["text"] for row in rows_of(folder / "items.jsonl")]
    with tempfile.TemporaryDirectory() as place:
        start, used = time.perf_counter(), time.process_time()
        left = {"ours": ours, "datatrove": theirs}[side](folder, items, Path(place) / "out")
        return {"seconds": time.perf_counter() - start, "processor": time.process_time() - used, "left": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=4.0)
    parser.add_argument("--side", choices=("ours", "datatrove"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.corpus)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        count, items = take(args.corpus, folder, int(args.megabytes * 1e6))
        size = (folder / "train.jsonl").stat().st_size
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "datatrove": []}
        for _ in range(args.rounds):
            for side, runs in found.items():
                command = [sys.executable, __file__, str(folder), "--side", side]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                print(side, runs[-1], file=sys.stderr)
        print(f"{count:,} documents, {size / 1e6:.1f} MB, 29 languages, {len(items):,} evaluation items; median of {args.rounds}\n")
        print("| | documents left | seconds | processor seconds | documents/s and core |\n|---|---|---|---|---|")
        rates = {}
        for side, runs in found.items():
            clock, used = (statistics.median(run[key] for run in runs) for key in ("seconds", "processor"))
            rates[side] = count / used
            print(f"| {side} | {runs[0]['left']:,} | {clock:.1f} | {used:.1f} | {rates[side]:,.0f} |")
        print(f"\nours / datatrove: {rates['ours'] / rates['datatrove']:.2f}")


if __name__ == "__main__":
    main()
