"""Problems whose answers are right, in texts that differ, and of which no held-out fact is in training."""

from __future__ import annotations

import re

import pytest

from qwen2.post.checks.checkers import make_checker
from qwen2.post.synth.arithmetic import Kind, Problem, problems, split_of, texts

SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "\u00d7": lambda a, b: a * b, "\u00f7": lambda a, b: a // b}


def fact(problem: Problem) -> tuple[str, int, int]:
    a, sign, b = problem.expression.split()
    parts = {"+": (int(a), int(b)), "-": (int(a) - int(b), int(b)), "\u00d7": (int(a), int(b)), "\u00f7": (int(a) // int(b), int(b))}[sign]
    return "sum" if sign in "+-" else "product", min(parts), max(parts)


def test_answers_are_right_and_texts_differ() -> None:
    found, checker = problems(3000, "train", seed=1), make_checker("number")
    assert len({problem.prompt for problem in found}) == 3000
    for problem in found:
        a, sign, b = problem.expression.split()
        assert problem.answer == SIGNS[sign](int(a), int(b)) >= 0
        numbers = [int(number) for number in re.findall(r"\d+", problem.prompt)]
        assert sorted({int(a), int(b)} - {1}) == sorted(set(numbers) - {1})
        for worked in (False, True):
            turns = problem.solved(worked)["messages"]
            assert checker.check(turns[1]["content"], problem.row()).right
            assert turns[0] == {"role": "user", "content": problem.prompt}
    assert {problem.language for problem in found} == set(texts())
    assert 0.45 < sum(problem.story for problem in found) / 3000 < 0.55


def test_a_held_out_fact_is_in_no_training_set_whatever_seed_range_and_language() -> None:
    held = {fact(problem) for seed in range(3) for problem in problems(600, "held-out", seed, Kind(largest=30))}
    train = {fact(problem) for seed in range(3) for problem in problems(2000, "train", seed, Kind(largest=99, languages=("de", "ja")))}
    assert len(held) > 50
    assert not held & train
    assert split_of("add", 5, 7) == split_of("add", 7, 5) == split_of("sub", 5, 7)
    assert split_of("mul", 5, 7) == split_of("div", 7, 5)


def test_a_share_is_held_out() -> None:
    facts = [split_of("add", a, b) for a in range(1, 100) for b in range(a, 100)]
    assert 0.18 < facts.count("held-out") / len(facts) < 0.22


def test_the_same_seed_gives_the_same_problems() -> None:
    assert problems(50, "train", 3) == problems(50, "train", 3) != problems(50, "train", 4)
    assert problems(50, "train", 3) == problems(80, "train", 3)[:50]


def test_kinds() -> None:
    found = problems(60, "train", 0, Kind(operations=("sub",), largest=9, languages=("zh", "en"), stories=1.0))
    assert {(problem.operation, problem.story) for problem in found} == {("sub", True)}
    assert [problem.language for problem in found[:4]] == ["zh", "en", "zh", "en"]
    assert max(problem.answer for problem in found) <= 9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"operations": ("add", "root")}, "operation 'root': unknown; there are add, sub, mul, div"),
        ({"operations": ()}, "no operation"),
        ({"languages": ("xx",)}, "language 'xx': unknown; there are en, zh"),
        ({"largest": 1}, "largest 1: must be from 2"),
        ({"stories": 1.5}, "stories 1.5: must be a share"),
    ],
)
def test_kinds_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kind(**wrong)  # type: ignore[arg-type]


def test_more_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"only [\d,]+ of 100,000 held-out problems found that differ; allow larger numbers"):
        problems(100_000, "held-out", 0, Kind(largest=5, largest_factor=5, languages=("en",)))
