"""Conversations of a few words, and runs that train a tiny model on them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from qwen2.post.finetuning.settings import SftSettings
from qwen2.post.finetuning.sft import Job, sft
from qwen2.post.rows.examples import Collected, collect
from qwen2.post.rows.records import Example
from qwen2.train.loop import State
from qwen2.weights.model import Model
from tests.conftest import tiny_model

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "then", "some", "more", "of", "it"]


def talk(rng: random.Random, turns: int = 1) -> list[dict[str, Any]]:
    """A conversation of so many questions and answers."""
    words = lambda most: " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))  # noqa: E731
    roles = ("user", "assistant") * turns
    return [{"role": role, "content": words(12)} for role in roles]


def talks(count: int, seed: int = 0) -> list[Example]:
    """Conversations of unlike lengths."""
    rng = random.Random(seed)
    return [Example(talk(rng, rng.choice((1, 1, 2, 3))), None, f"talks:{number}") for number in range(1, count + 1)]


def small(**changes: Any) -> SftSettings:
    """Settings of a run of some steps that writes every line and measures nothing."""
    given: dict[str, Any] = {"steps": 6, "epochs": 0.0, "length": 128, "batch": 4, "micro_batch": 2, "lr": 3e-3, "samples": 0}
    given |= {"log_every": 1, "save_every": 2, "eval_every": 3, "measure": False, "tensorboard": False, "precision": "float32"}
    return SftSettings(**{**given, **changes})


def run(out: Path, examples: list[Example] | None = None, model: Model | None = None, resume: bool = False, **changes: Any) -> State:
    """Fine-tune a tiny model, as `qwen2 sft` does."""
    settings, start = small(**changes), tiny_model() if model is None else model
    return sft(Job(gathered(settings, examples, start), start, settings, out, resume=resume))


def gathered(settings: SftSettings, examples: list[Example] | None = None, model: Model | None = None) -> Collected:
    """Examples for such a run."""
    template = (tiny_model() if model is None else model).template
    return collect(talks(40) if examples is None else examples, template, settings)


@pytest.fixture
def model() -> Model:
    return tiny_model()
