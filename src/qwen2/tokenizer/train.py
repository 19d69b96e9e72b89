"""Learn a vocabulary: byte-level BPE with Qwen2's normalisation, split pattern and control tokens, on the `tokenizers` library.

The texts are read twice and never held: once to count bytes by language, once to learn. Between the two each language is given its
share of the sample: in proportion to bytes ** (1 / temperature), so that small languages get tokens of their own; a language
with less text than its share is repeated, a few times at most, and one with more is thinned out evenly, document by document.
Ids are as Qwen2 has them: 256 bytes, then the merges in rank order, then the control tokens. The same texts in the same order
with the same settings give the same file.

What is left out: unigram models, dropout, other split patterns, and deciding what text is good (`data/`).

    learn(lambda: read_texts(["documents/"]), Settings(vocab=8192)).tokenizer.save("tokenizer")
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from qwen2.tokenizer.alphabet import CHAR_OF_BYTE
from qwen2.tokenizer.parts import END_OF_TEXT, MAX_ID, QWEN2_5_CONTROL, QWEN2_CONTROL, Parts
from qwen2.tokenizer.splits import QWEN2
from qwen2.tokenizer.texts import Text
from qwen2.tokenizer.tokenizer import Tokenizer, without_surrogates

CONTROL = {"qwen2": tuple(QWEN2_CONTROL), "qwen2.5": tuple(QWEN2_5_CONTROL)}
RECORD = "training.json"
SHORTEST_SAMPLE = 1000  # bytes: below, a share would be rounding errors

Watch = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all or 0


@dataclass(frozen=True)
class Settings:
    """How a vocabulary is learned. Sizes in entries and bytes."""

    vocab: int = 8192
    """All entries: 256 bytes, merges, control tokens."""
    control: str = "qwen2"
    """Whose control tokens: qwen2 (3) or qwen2.5 (22)."""
    temperature: float = 3.0
    """1 takes languages as they are in the text; larger is more even."""
    sample: int | None = 100_000_000
    """Bytes of text that are learned from, at most."""
    repeats: float = 4.0
    """How often a language's text may be read, at most."""
    least: int = 2
    """How often a pair must occur to become an entry."""

    def __post_init__(self) -> None:
        if self.control not in CONTROL:
            raise ValueError(f"control {self.control!r}: must be one of {', '.join(CONTROL)}")
        fixed = 256 + len(CONTROL[self.control])
        if not fixed < self.vocab < MAX_ID:
            raise ValueError(
                f"vocab {self.vocab}: must be above {fixed} (256 bytes and {fixed - 256} control tokens come first) and below {MAX_ID}"
            )
        if not 1 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature {self.temperature}: must be at least 1 (1 takes languages as they are, 5 makes them nearly even)"
            )
        if self.sample is not None and self.sample < SHORTEST_SAMPLE:
            raise ValueError(f"sample {self.sample}: must be at least {SHORTEST_SAMPLE} bytes")
        if not self.repeats > 0:
            raise ValueError(f"repeats {self.repeats}: must be above 0")
        if self.least < 1:
            raise ValueError(f"least {self.least}: must be at least 1")


@dataclass(frozen=True)
class Sampled:
    """Of one language: documents and bytes that there are, and bytes that were learned from (repeats counted)."""

    documents: int
    bytes: int
    sampled: int = 0


@dataclass(frozen=True)
class Learned:
    """A vocabulary and what it was learned from. `full` is false where the text had too few pairs for the size asked for."""

    tokenizer: Tokenizer
    settings: Settings
    languages: dict[str, Sampled] = field(repr=False)

    @property
    def full(self) -> bool:
        return self.tokenizer.vocab_size == self.settings.vocab

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files and `training.json`, the record of how it was made; whole or not at all.

        Raises FileExistsError where the folder is there already.
        """
        if folder.exists():
            raise FileExistsError(f"{folder}: exists already; write the tokenizer into a new folder")
        draft = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        try:
            self.tokenizer.save(draft)
            digest = sha256((draft / "tokenizer.json").read_bytes()).hexdigest()
            languages = {language: asdict(sampled) for language, sampled in self.languages.items()}
            record = {"settings": asdict(self.settings), "vocab": self.tokenizer.vocab_size, "sha256": digest, "languages": languages}
            (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def learn(texts: Callable[[], Iterable[Text]], settings: Settings, watch: Watch | None = None) -> Learned:
    """Learn a vocabulary from `texts()`, which is called twice and must give the same (language, text) pairs both times.

    Raises ValueError where there is no text.
    """
    there = count(texts(), watch)
    weights = sample_weights({language: entry.bytes for language, entry in there.items()}, settings)
    backend = Backend(BPE())
    _as_qwen2(backend)
    sample = Sample(texts(), weights, watch)
    fixed = len(CONTROL[settings.control])
    trainer = BpeTrainer(
        vocab_size=settings.vocab - fixed,
        min_frequency=settings.least,
        initial_alphabet=sorted(CHAR_OF_BYTE.values()),
        show_progress=False,
    )
    backend.train_from_iterator(iter(sample), trainer)
    model = json.loads(backend.to_str())["model"]
    languages = {language: replace(entry, sampled=sample.taken.get(language, 0)) for language, entry in there.items()}
    return Learned(_tokenizer(model, CONTROL[settings.control]), settings, languages)


def count(texts: Iterable[Text], watch: Watch | None = None) -> dict[str, Sampled]:
    """Documents and bytes by language, most first. Raises ValueError where there is no text."""
    documents: dict[str, int] = {}
    sizes: dict[str, int] = {}
    done = 0
    for language, text in texts:
        size = _size(text)
        documents[language] = documents.get(language, 0) + 1
        sizes[language] = sizes.get(language, 0) + size
        done += size
        if watch is not None:
            watch("counting", done, 0)
    if not done:
        raise ValueError("there is no text to learn a vocabulary from: the files are empty")
    return {language: Sampled(documents[language], sizes[language]) for language in sorted(sizes, key=lambda x: (-sizes[x], x))}


def sample_weights(sizes: dict[str, int], settings: Settings) -> dict[str, float]:
    """How often each language's text is read, from its bytes: (share of the sample) / (bytes there are), `repeats` at most.

    What languages at that limit leave of the sample goes to the others.
    """
    here = {language: size for language, size in sizes.items() if size}
    total = sum(here.values())
    left = float(total if settings.sample is None else min(settings.sample, total))
    shares = {language: (size / total) ** (1 / settings.temperature) for language, size in here.items()}
    weights: dict[str, float] = {}
    while shares:
        scale = left / sum(shares.values())
        short = [language for language in shares if shares[language] * scale >= settings.repeats * here[language]]
        if not short:
            return weights | {language: shares[language] * scale / here[language] for language in shares}
        for language in short:
            weights[language] = settings.repeats
            left -= settings.repeats * here[language]
            del shares[language]
    return weights


class Sample:
    """Each text as often as its language's weight says: 2.5 gives two and three copies in turn, 0.1 every tenth document.

    Spread over the whole of a language and counted in bytes, so that neither a place nor long documents are preferred; no numbers
    are drawn. `taken` holds the bytes by language that have been handed out.
    """

    def __init__(self, texts: Iterable[Text], weights: dict[str, float], watch: Watch | None = None) -> None:
        self.texts, self.weights, self.watch = texts, weights, watch
        self.taken: dict[str, int] = {}

    def __iter__(self) -> Iterator[str]:
        due: dict[str, float] = {}  # bytes that a language has been promised and not given
        given = 0
        for language, text in self.texts:
            size = _size(text)
            if not size:
                continue
            due[language] = due.get(language, 0.0) + size * self.weights.get(language, 0.0)
            copies = max(0, int(due[language] / size + 0.5))
            due[language] -= copies * size
            self.taken[language] = self.taken.get(language, 0) + copies * size
            given += copies * size
            if self.watch is not None:
                self.watch("learning", given, 0)
            for _ in range(copies):
                yield without_surrogates(text)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _as_qwen2(backend: Backend) -> None:
    """Normalise and split as Qwen2 does; the library's own objects, from its own notation."""
    skeleton = json.loads(backend.to_str()) | {"normalizer": QWEN2.normalizer, "pre_tokenizer": QWEN2.pre_tokenizer}
    whole = Backend.from_str(json.dumps(skeleton))
    backend.normalizer, backend.pre_tokenizer = whole.normalizer, whole.pre_tokenizer


def _tokenizer(model: dict[str, Any], names: tuple[str, ...]) -> Tokenizer:
    vocab: dict[str, int] = model["vocab"]
    control = {name: len(vocab) + i for i, name in enumerate(names)}
    merges = [(left, right) for left, right in model["merges"]]
    end = control[END_OF_TEXT]
    return Tokenizer.from_parts(Parts(vocab, merges, control, split=QWEN2, eos=(end,), pad=end))
