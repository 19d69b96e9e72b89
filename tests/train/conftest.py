"""Shards of a few sentences in two languages, and what a small run needs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen2.config import ModelConfig, tiny
from qwen2.data.batches import Batch, Row, pack
from qwen2.data.shards import Shards, ShardWriter, TokenizerInfo, sha256_of
from qwen2.model import Qwen2, packed_attend
from qwen2.train.folder import RunFolder
from qwen2.train.loop import Loop
from qwen2.train.loss import cross_entropy
from qwen2.train.metrics import read_lines
from qwen2.train.settings import Settings
from qwen2.train.task import Task
from qwen2.train.world import World
from tests.conftest import random_network, tiny_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "then",
    "some",
    "more",
    "of",
    "it",
    "you",
    "are",
    "a",
    "helpful",
    "assistant",
]


def write_shards(folder: Path, documents: int = 60, seed: int = 0, recipe: Mapping[str, Any] | None = None) -> Path:
    """English and German documents of unlike lengths, some held out, with the tokenizer beside them."""
    tokenizer, rng = tiny_tokenizer(), random.Random(seed)
    tokenizer.save(folder / "tokenizer")
    info = TokenizerInfo(sha256_of(folder / "tokenizer" / "tokenizer.json"), tokenizer.vocab_size, 509)
    with ShardWriter(folder, info, recipe=recipe) as writer:
        for number in range(documents):
            language, split = ("de" if number % 3 == 0 else "en"), ("held-out" if number % 10 == 0 else "train")
            text = " ".join(rng.choice(WORDS) for _ in range(rng.choice((3, 20, 60, 150))))
            writer.add(split, language, "words", tokenizer.encode(text), len(text.encode()))
    return folder


@pytest.fixture(scope="session")
def shards_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus") / "shards")


@pytest.fixture
def shards(shards_folder: Path) -> Shards:
    return Shards.open(shards_folder)


class Toy:
    """A task over fixed rows of random tokens: what the loop is tested with, without shards."""

    def __init__(
        self, rows: int = 4, length: int = 24, micro: int = 4, documents: int = 3, seed: int = 0, spoil: tuple[int, ...] = ()
    ) -> None:
        self.rows, self.length, self.micro, self.documents, self.seed, self.spoil = rows, length, micro, documents, seed, spoil
        self.turn = 0

    def row(self, number: int) -> Row:
        """A row of some documents of unlike lengths, with a few labels that do not count."""
        rng = random.Random(1000 * self.seed + number)
        cuts = sorted(rng.sample(range(1, self.length), self.documents - 1))
        lengths = tuple(end - start for start, end in pairwise([0, *cuts, self.length]))
        tokens = np.array([rng.randrange(512) for _ in range(self.length)])
        labels = np.array([rng.randrange(512) if rng.random() < 0.7 else -100 for _ in range(self.length)])
        return Row(tokens, labels, lengths)

    def next_step(self) -> list[Batch]:
        first = self.turn * self.rows
        self.turn += 1
        rows = [self.row(first + number) for number in range(self.rows)]
        return [pack(rows[start : start + self.micro]) for start in range(0, self.rows, self.micro)]

    def loss(self, network: Qwen2, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden = network(batch.tokens, packed_attend(network.config, batch.positions, batch.lengths))
        total, _, sums = cross_entropy(network, hidden, batch.labels)
        return (total * float("nan") if self.turn in self.spoil else total), dict(sums)

    def resume(self, state: Mapping[str, Any]) -> None:
        self.turn = state["turn"]

    def task(self) -> Task[Batch]:
        return Task(
            self.next_step, self.loss, lambda b: b.targets, lambda b: len(b.tokens), lambda b: b, lambda: {"turn": self.turn}, self.resume
        )


def small(**changes: Any) -> Settings:
    """Settings of a run of some steps that writes every line and measures nothing."""
    given = {"steps": 6, "log_every": 1, "save_every": 2, "measure": False, "tensorboard": False, "precision": "float32", "lr": 1e-2}
    return Settings(**{**given, **changes})


def run(folder: Path, toy: Toy | None = None, resume: bool = False, config: ModelConfig | None = None, **changes: Any) -> Loop[Batch]:
    """Train the toy, as the real jobs are trained."""
    network = random_network(tiny() if config is None else config)
    with RunFolder(folder) as held:
        loop = Loop(network, (Toy() if toy is None else toy).task(), small(**changes), held, World())
        loop.run(resume)
    return loop


def logged(folder: Path, *names: str) -> list[list[Any]]:
    """The numbers of all logged steps."""
    return [[line[name] for name in names] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
