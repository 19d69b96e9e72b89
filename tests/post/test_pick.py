"""Which answers are taken: short ones that differ, pairs by their rules, the same each time."""

from __future__ import annotations

import pytest

from qwen2.post.synth.pick import Candidate, distance, pairs, pick


def answers(*texts: str, said: str = "") -> list[Candidate]:
    return [Candidate(i, text, len(text), said) for i, text in enumerate(texts)]


def indices(taken: list[Candidate]) -> list[int]:
    return [one.index for one in taken]


def test_distance() -> None:
    assert distance("one and two", "One  and\ntwo ") == 0
    assert distance("abcd", "wxyz") == 1
    assert distance("abcde", "abcdf") == pytest.approx(1 - 1 / 3)
    assert distance("", "") == 0
    assert distance("\u4e00\u4e8c\u4e09\u56db\u4e94", "\u4e00\u4e8c\u4e09\u56db\u516d") == distance("abcde", "abcdf")


def test_the_shortest_then_what_differs_most() -> None:
    listed = answers("3 + 4 = 7", "3 + 4 = 7!", "Count on from three: 7", "3 + 4 = 7")
    assert indices(pick(listed, 2)) == [0, 2]
    assert indices(pick(listed, 2, "shortest")) == [0, 1]
    assert indices(pick(listed, 9)) == [0, 2, 1]  # 3 is 0 again
    assert indices(pick(listed, 9, least_distance=0.5)) == [0, 2]
    assert indices(pick(listed, 9, "shortest", 0.5)) == [0, 2]
    assert pick(listed, 0) == pick([], 4) == []


def test_ties_go_to_the_earlier() -> None:
    assert indices(pick(answers("aaaa", "bbbb", "cccc"), 3)) == [0, 1, 2]


def test_pairs_by_length() -> None:
    right = answers("1234567890", "12")
    wrong = answers("x" * 30, "y" * 11, "z", "z")
    found = pairs(right, wrong, 5)
    assert [(good.index, bad.index) for good, bad in found] == [(0, 1), (1, 2)]
    assert pairs(right, [], 5) == pairs([], wrong, 5) == pairs(right, wrong, 0) == []


def test_pairs_by_the_commonest_result() -> None:
    wrong = [Candidate(0, "it is 8", 7, "8"), Candidate(1, "maybe it is 9", 13, "9"), Candidate(2, "9", 1, "9"), Candidate(3, "9", 1, "9")]
    ((_, bad),) = pairs(answers("it is 7"), wrong, 1, "frequent")
    assert (bad.index, bad.said) == (1, "9")  # both are six tokens away: the earlier
    ((_, bad),) = pairs(answers("it is 7"), wrong, 1, "length")
    assert bad.said == "8"
