"""How far an evaluation's figure may be off because its examples are these and not others: standard errors, and their names.

Two figures whose difference is several times the root of the sum of both errors' squares do differ. Before and after training the examples
are the same, so that a smaller difference may be a real one too. Left out: intervals (post/checks/exact.py has those of shares).

    of_share(0.7, 100)                     # 0.0458
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = "standard error"


def named(figure: str) -> str:
    """The name of a figure's error, written as its own is: held-out loss standard error, accuracy_standard_error."""
    return f"{figure} {SUFFIX}" if " " in figure else f"{figure}_{SUFFIX.replace(' ', '_')}"


def is_error(name: str) -> bool:
    """Whether a name is that of an error."""
    return name.replace("_", " ").endswith(SUFFIX)


def said(values: Mapping[str, float]) -> Iterator[str]:
    """Each figure of an evaluation with its error, if it has one, as in accuracy 0.7000 +- 0.0458."""
    for name, value in values.items():
        error = values.get(named(name))
        if not is_error(name):
            yield f"{name} {value:.4f}" + ("" if error is None else f" +- {error:.4f}")


def of_share(share: float, count: int) -> float:
    """Of a share of `count` examples, which is binomial. Raises ValueError for no examples."""
    if count < 1:
        raise ValueError("no examples: a share has no standard error")
    return sqrt(share * (1 - share) / count)


def of_ratio(sums: Tensor, counts: Tensor) -> float | None:
    """Of sum(sums) / sum(counts), a mean over tokens whose examples (E,) were drawn; None for fewer than two examples.

    By linearisation (Cochran 1977, "Sampling techniques", section 6): an example counts by how far its sum is from its tokens' share.
    """
    examples, total = len(sums), float(counts.sum())
    if examples < 2 or total == 0:
        return None
    apart = sums.double() - float(sums.double().sum()) / total * counts.double()
    return sqrt(float(apart.square().sum()) * examples / (examples - 1)) / total
