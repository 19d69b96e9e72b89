"""Exact match with its interval, and the difference of two models on the same problems with its own.

A share of right answers has Wilson's score interval; the difference of two models that answered the same problems has Newcombe's
paired interval, which knows how often both were right (Newcombe 1998, "Improved confidence intervals for the difference between
binomial proportions based on paired data", method 10). Several runs of the same problems, such as seeds, are averaged by problem and
bootstrapped over problems (`paired_bootstrap`), since answers to one problem are no independent ones.

    match = wilson([True, True, False])         # 66.7 % (20.8 to 93.9) of 3
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
