"""A sampler that knows what it will say, and a run of it that can be killed at any prompt: `python -m tests.post.fake OUT PROMPTS COUNT`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen2.post.checks.checkers import make_checker
from qwen2.post.synth.prompts import Prompt, read_prompts
from qwen2.post.synth.reject import reject
from qwen2.post.synth.sampling import Answers, Sampled, seed_of
from qwen2.post.synth.settings import RejectSettings


def answers_of(prompt: Prompt, k: int, seed: int) -> Answers:
    """Sums, of which the even samples are right; every fifth is cut off."""
    wanted = int(prompt.row["answer"])
    first = seed_of(seed, prompt.key) % 7
    return [
        Sampled(
            f"{'Well, ' * ((first + i) % 4)}it is {wanted if i % 2 == 0 else wanted + 1 + i % 3}.",
            4 + 2 * ((first + i) % 4),
            "length" if i % 5 == 4 else "stop",
        )
        for i in range(k)
    ]


@dataclass
class FakeSampler:
    """Answers prompts in another order than they are asked, as an engine does; counts what it was asked."""

    answer: Callable[[Prompt, int, int], Answers | str] = answers_of
    name: str = "fake"
    digest: str = "0123456789abcdef"
    params: dict[str, Any] = field(default_factory=lambda: {"temperature": 1.0, "top_k": 0})
    asked: list[str] = field(default_factory=list)
    before: list[dict[str, Any]] = field(default_factory=list)  # messages of its own
    most: int | None = None  # prompts after which the process is killed, by itself

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [*self.before, *map(dict, messages)]

    def message(self, text: str, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        return {"role": "assistant", "content": text}

    def sample(self, prompts: Iterable[Prompt], k: int, seed: int) -> Generator[tuple[Prompt, Answers | str], None, None]:
        for number, prompt in enumerate(sorted(prompts, key=lambda prompt: prompt.key)):
            if number == self.most:
                os.kill(os.getpid(), signal.SIGKILL)
            self.asked.append(prompt.key)
            yield prompt, self.answer(prompt, k, seed)


if __name__ == "__main__":
    checker = make_checker("number")
    reject(FakeSampler(most=int(sys.argv[3])), read_prompts([Path(sys.argv[2])], checker), checker, RejectSettings(k=8), Path(sys.argv[1]))
