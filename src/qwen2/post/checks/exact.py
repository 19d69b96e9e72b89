"""Exact match with its interval, and the difference of two models on the same problems with its own.

A share of right answers has Wilson's score interval; the difference of two models that answered the same problems has Newcombe's
paired interval, which knows how often both were right (Newcombe 1998, "Improved confidence intervals for the difference between
binomial proportions based on paired data", method 10). Several runs of the same problems, such as seeds, are averaged by problem and
bootstrapped over problems (`paired_bootstrap`), since answers to one problem are no independent ones.

    measure(EngineSampler(llm, SamplingParams(temperature=0, max_tokens=64)), prompts, make_checker("number")).match
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qwen2.post.synth.judge import judged
from qwen2.post.synth.progress import Progress

if TYPE_CHECKING:
    from qwen2.post.checks.checkers import Checker
    from qwen2.post.synth.prompts import Prompt, Prompts
    from qwen2.post.synth.sampling import Sampler

Z = 1.959963984540054  # of a 95 % interval
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A share or a difference of shares, with the interval that holds it in 95 of 100 cases, and how many problems it is of."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """In percent, as in 66.7 % (20.8 to 93.9) of 3."""
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f}) of {self.count:,}"


@dataclass(frozen=True)
class Measured:
    """A model's answers to problems, one each, in the problems' order. Cut off, refused or not judged counts as not right."""

    model: str
    digest: str
    sampling: dict[str, Any]
    checker: str
    prompts: list[Prompt]
    records: list[dict[str, Any]]

    @property
    def right(self) -> list[bool]:
        """Problem by problem."""
        return [any(answer["right"] is True for answer in record.get("answers", ())) for record in self.records]

    @property
    def match(self) -> Estimate:
        """The share of problems that are answered rightly."""
        return wilson(self.right)

    def by(self, column: Literal["source", "language"]) -> dict[str, Estimate]:
        """The same by what the prompts' rows say."""
        flags: dict[str, list[bool]] = {}
        for prompt, right in zip(self.prompts, self.right, strict=True):
            flags.setdefault(getattr(prompt, column), []).append(right)
        return {name: wilson(listed) for name, listed in sorted(flags.items())}

    def not_judged(self) -> dict[str, int]:
        """Problems by why there is no verdict: refused, cut off, a checker that failed."""
        reasons: Counter[str] = Counter()
        for record in self.records:
            reasons.update([f"not asked: {record['refused']}"] if "refused" in record else [])
            reasons.update(one["said"] for one in record.get("answers", ()) if one["right"] is None or one["finish"] != "stop")
        return dict(reasons.most_common())

    def report(self) -> dict[str, Any]:
        """As JSON: the figures, and every answer, so that another model's can be set against them."""
        answers = [{**record, "right": right} for record, right in zip(self.records, self.right, strict=True)]
        about = {"model": self.model, "digest": self.digest, "sampling": self.sampling, "checker": self.checker}
        groups = {f"by_{name}": {key: asdict(value) for key, value in self.by(name).items()} for name in COLUMNS}
        return {**about, "exact_match": asdict(self.match), **groups, "not_judged": self.not_judged(), "problems": answers}


COLUMNS: tuple[Literal["source"], Literal["language"]] = ("source", "language")


def measure(
    sampler: Sampler, prompts: Prompts, checker: Checker, workers: int = 2, seed: int = 0, shown: bool | Literal["auto"] = False
) -> Measured:
    """One answer to each problem, judged."""
    found: dict[str, dict[str, Any]] = {}
    with Progress(len(prompts.found), 0, shown) as progress, closing(sampler.sample(prompts.found, 1, seed)) as answers:
        for record in judged(answers, checker, workers):
            found[record["key"]] = record
            progress.prompt(record)
    records = [found[prompt.key] for prompt in prompts.found]
    return Measured(sampler.name, sampler.digest, sampler.params, checker.name, prompts.found, records)


def difference(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Estimate:
    """Reports of the same problems, after minus before: of a model each, or of several runs each, such as seeds.

    Raises ValueError where the problems are not the same.
    """
    runs = [[{one["key"]: bool(one["right"]) for one in report["problems"]} for report in side] for side in (before, after)]
    keys = list(runs[0][0]) if runs[0] else []
    for run in (*runs[0], *runs[1]):
        check_same(keys, run)
    flags = [[[run[key] for key in keys] for run in side] for side in runs]
    return paired(flags[0][0], flags[1][0]) if len(flags[0]) == len(flags[1]) == 1 else paired_bootstrap(flags[0], flags[1])


def check_same(problems: Iterable[str], others: Iterable[str]) -> None:
    """ValueError where these are not the same problems, by their keys."""
    if unlike := {*problems} ^ {*others}:
        raise ValueError(f"{len(unlike):,} problems are on one side only: measure all models on the same file")


def wilson(right: Sequence[bool], z: float = Z) -> Estimate:
    """The share of right answers. Raises ValueError where there are none."""
    if not right:
        raise ValueError("no answers: a share needs at least one")
    count, share = len(right), sum(right) / len(right)
    low, high = _interval(sum(right), count, z)
    return Estimate(share, low, high, count)


def _interval(successes: int, count: int, z: float) -> tuple[float, float]:
    share, weight = successes / count, z * z / count
    centre, half = (share + weight / 2) / (1 + weight), z * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == count else centre + half)


def paired(before: Sequence[bool], after: Sequence[bool], z: float = Z) -> Estimate:
    """After minus before, problem by problem. Raises ValueError where these are not answers to the same number of problems."""
    count = _same(before, after)
    pairs = Counter(zip(map(bool, before), map(bool, after), strict=True))
    both, lost, won, neither = pairs[True, True], pairs[True, False], pairs[False, True], pairs[False, False]
    first, second = (both + lost) / count, (both + won) / count
    (low_1, high_1), (low_2, high_2) = _interval(both + lost, count, z), _interval(both + won, count, z)
    sides = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    cross = both * neither - lost * won
    correction = 0.0 if sides == 0 else (cross if cross <= 0 else max(cross - count / 2, 0)) / math.sqrt(sides)
    difference = second - first

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correction * a * b + b * b))

    return Estimate(difference, difference - half(second - low_2, high_1 - first), difference + half(high_2 - second, first - low_1), count)


def paired_bootstrap(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """After minus before, a row per run (R, P) over the same P problems: percentiles of resampled problems, the same for a seed.

    Raises ValueError where the problems are not the same number in every run.
    """
    if not before or not after or len({len(run) for run in (*before, *after)}) != 1:
        raise ValueError("runs to compare need answers to the same problems, at least one run of each model")
    _same(before[0], after[0])
    differences = np.asarray(after, dtype=float).mean(0) - np.asarray(before, dtype=float).mean(0)  # (P,)
    generator, count = np.random.default_rng(seed), len(differences)
    means = [differences[generator.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(differences.mean()), float(low), float(high), count)


def _same(before: Sequence[object], after: Sequence[object]) -> int:
    if len(before) != len(after) or not before:
        counts = f"{len(before):,} and {len(after):,} answers"
        raise ValueError(f"{counts}: a paired difference needs one to each problem from both")
    return len(before)
