"""What came of a run of rejection sampling: how many prompts were solved, pass@k, acceptance by source, why answers were refused.

pass@k is the unbiased estimate of Chen et al. 2021 ("Evaluating Large Language Models Trained on Code"): of n answers of which c are
right, 1 - C(n - c, k) / C(n, k), averaged over prompts. An answer that was cut off, or whose checker failed, is not right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2.post.synth.prompts import Prompt, Prompts

REASONS = 20  # kinds of reasons that are listed


@dataclass(frozen=True)
class Group:
    """The prompts of one source or language: how many, how many with a right answer, their answers, how many of them right."""

    prompts: int
    solved: int
    answers: int
    right: int

    @property
    def acceptance(self) -> float:
        """The share of answers that are right."""
        return self.right / self.answers if self.answers else 0.0


@dataclass(frozen=True)
class Summary:
    """Counts of a whole run. `wrong` are whole answers, `cut` those that reached max_tokens, `failed` those whose checker failed."""

    prompts: int
    finished: int
    refused: dict[str, int]  # prompts by why they could not be asked
    broken: dict[str, int]  # rows of the files by what is wrong with them
    repeated: int
    unused_columns: tuple[str, ...]
    solved: int
    answers: int
    right: int
    wrong: int
    cut: int
    empty: int  # of the right ones those without text, which become no rows
    failed: dict[str, int]  # answers by how the checker failed
    pass_at: dict[int, float]
    by_source: dict[str, Group]
    by_language: dict[str, Group]
    sft_rows: int
    pairs: int

    @property
    def acceptance(self) -> float:
        """The share of answers that are right."""
        return self.right / self.answers if self.answers else 0.0

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.finished:,} of {self.prompts:,} prompts, {self.solved:,} solved; {self.answers:,} answers"
        failed = f", checker failed {sum(self.failed.values()):,}" if self.failed else ""
        yield f"right {self.right:,} ({self.acceptance:.1%}), wrong {self.wrong:,}, cut off {self.cut:,}{failed}"
        if self.pass_at:
            yield "  ".join(f"pass@{k} {value:.1%}" for k, value in self.pass_at.items())
        if self.empty:
            yield f"right and empty, in no row: {self.empty:,}"
        for title, counts in (("checker failed", self.failed), ("not asked", self.refused), ("row left out", self.broken)):
            for reason, count in counts.items():
                yield f"{title}: {count:,} x {reason}"
        if self.repeated:
            yield f"{self.repeated:,} prompts stand in the files again, and were asked once"
        if self.unused_columns:
            yield f"columns that nobody looks at: {', '.join(self.unused_columns)}"
        for title, groups in (("source", self.by_source), ("language", self.by_language)):
            for name, group in groups.items():
                if len(groups) > 1:
                    yield f"{title} {name or '-'}: {group.solved:,} of {group.prompts:,} solved, {group.acceptance:.1%} accepted"


def summarise(prompts: Prompts, finished: Sequence[tuple[Prompt, dict[str, Any]]], k: int, sft_rows: int, pairs: int) -> Summary:
    """Count everything."""
    asked = [(prompt, record["answers"]) for prompt, record in finished if "refused" not in record]
    answers = [answer for _, listed in asked for answer in listed]
    right = sum(answer["right"] is True for answer in answers)
    cut = sum(answer["finish"] != "stop" for answer in answers)
    failed = Counter(answer["said"] for answer in answers if answer["right"] is None)
    counts = [sum(answer["right"] is True for answer in listed) for _, listed in asked]
    return Summary(
        len(prompts.found),
        len(finished),
        common(record["refused"] for _, record in finished if "refused" in record),
        dict(prompts.broken.most_common(REASONS)),
        prompts.repeated,
        prompts.unused,
        sum(count > 0 for count in counts),
        len(answers),
        right,
        len(answers) - right - cut - failed.total(),
        cut,
        sum(answer["right"] is True and not answer["text"].strip() for answer in answers),
        dict(failed.most_common(REASONS)),
        {size: sum(pass_at(k, count, size) for count in counts) / len(counts) for size in sizes(k)} if counts else {},
        groups((prompt.source, listed) for prompt, listed in asked),
        groups((prompt.language, listed) for prompt, listed in asked),
        sft_rows,
        pairs,
    )


def common(reasons: Iterable[str]) -> dict[str, int]:
    """How often each, the commonest first."""
    return dict(Counter(reasons).most_common(REASONS))


def groups(asked: Iterable[tuple[str, list[dict[str, Any]]]]) -> dict[str, Group]:
    """Counts by name."""
    found: dict[str, Counter[str]] = {}
    for name, answers in asked:
        right = sum(answer["right"] is True for answer in answers)
        found.setdefault(name, Counter()).update(prompts=1, solved=int(right > 0), answers=len(answers), right=right)
    return {name: Group(c["prompts"], c["solved"], c["answers"], c["right"]) for name, c in sorted(found.items())}


def pass_at(count: int, right: int, k: int) -> float:
    """The chance that one of k of the `count` answers is right, where `right` of them are."""
    return 1.0 - comb(count - right, k) / comb(count, k)


def sizes(k: int) -> list[int]:
    """1, 2, 4, ... and k itself."""
    return sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k})
