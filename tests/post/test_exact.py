"""Intervals against published examples, against what they promise, and against their limits."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2.post.checks.exact import Estimate, paired, paired_bootstrap, wilson


def flags(right: int, count: int) -> list[bool]:
    return [True] * right + [False] * (count - right)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],  # Newcombe 1998, table I
)
def test_wilson(right: int, count: int, low: float, high: float) -> None:
    found = wilson(flags(right, count))
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)
    mirrored = wilson(flags(count - right, count))
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low))


def pairs(both: int, lost: int, won: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * (both + lost) + [False] * (won + neither)
    after = [True] * both + [False] * lost + [True] * won + [False] * neither
    return before, after


@pytest.mark.parametrize(
    (
        "cells",
        "low",
        "high",
    ),  # the first from Newcombe 1998 (paired), table II, method 10; the others by hand, the first model minus the second
    [((36, 12, 2, 0), 0.0569, 0.3404), ((0, 54, 0, 0), 0.9061, 1.0), ((54, 0, 0, 0), -0.0664, 0.0664)],
)
def test_paired(cells: tuple[int, int, int, int], low: float, high: float) -> None:
    before, after = pairs(*cells)
    found = paired(after, before)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)
    turned = paired(before, after)
    assert (turned.value, turned.low, turned.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_a_paired_interval_is_narrower_where_the_models_agree() -> None:
    agreeing, opposed = paired(*pairs(900, 20, 80, 0)), paired(*pairs(820, 100, 160, -80 + 80))
    assert agreeing.value == pytest.approx(0.06)
    assert agreeing.high - agreeing.low < opposed.high - opposed.low
    assert agreeing.low > 0


def test_the_bootstrap_agrees_with_the_closed_form_and_is_the_same_each_time() -> None:
    before, after = pairs(600, 100, 250, 1050)
    closed, drawn = paired(before, after), paired_bootstrap([before], [after], seed=3)
    assert drawn == paired_bootstrap([before], [after], seed=3)
    assert (drawn.value, drawn.low, drawn.high) == pytest.approx((closed.value, closed.low, closed.high), abs=0.004)


def test_seeds_of_one_problem_are_not_independent() -> None:
    before, after = pairs(60, 10, 25, 105)
    once, thrice = paired_bootstrap([before], [after]), paired_bootstrap([before] * 3, [after] * 3)
    assert once == thrice  # three times the same answers tell no more


def test_an_interval_holds_what_it_promises() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        before = generator.random(200) < 0.4
        after = np.where(generator.random(200) < 0.7, before, generator.random(200) < 0.6)
        found = paired(before.tolist(), after.tolist())
        hits += found.low <= 0.3 * (0.6 - 0.4) <= found.high
    assert 0.93 <= hits / 500 <= 0.98


def test_how_it_reads() -> None:
    assert str(Estimate(2 / 3, 0.2077, 0.9386, 3000)) == "66.7 % (20.8 to 93.9) of 3,000"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no answers"):
        wilson([])
    with pytest.raises(ValueError, match="2 and 1 answers: a paired difference needs one to each problem from both"):
        paired([True, False], [True])
    with pytest.raises(ValueError, match="need answers to the same problems"):
        paired_bootstrap([[True], [True, False]], [[True]])
    with pytest.raises(ValueError, match="need answers to the same problems"):
        paired_bootstrap([], [[True]])
