"""Turns: whether they are learned, in whatever words, and those in which a person says nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from qwen2.post.rows.formats import NO_PROMPT, record
from qwen2.post.rows.records import Example, Preference, Skipped
from tests.post.test_formats import TALK, assistant, user


@pytest.mark.parametrize(
    ("key", "value", "learned"),
    [
        ("train", "false", False),
        ("train", "True", True),
        ("weight", "0", False),
        ("weight", "1.0", True),
        ("loss", " 0.0 ", False),
        ("loss", "", True),
        ("weight", True, True),
    ],
)
def test_weights_may_be_texts(key: str, value: object, learned: bool) -> None:
    made = record({"messages": [*TALK[:3], assistant("a2", **{key: value})]}, "f:1", Counter())
    assert isinstance(made, Example), made
    assert made.untrained == (() if learned else (3,))


@pytest.mark.parametrize("value", [0.5, "0.5", 7, "much", 0])
def test_weights_of_turns_that_are_not_learned_anyway_say_nothing(value: object) -> None:
    made = record({"messages": [user("q1") | {"weight": value}, *TALK[1:]]}, "f:1", Counter())
    assert made == Example(TALK, None, "f:1")
    other = record({"messages": [user("q1"), assistant("a1", weight=value)]}, "f:1", Counter())
    assert isinstance(other, Skipped)


@pytest.mark.parametrize(
    "turn", [{"role": "user"}, {"role": "user", "content": None}, {"role": "user", "text": "hello"}, user(" \n"), user("")]
)
def test_a_person_who_says_nothing_is_no_prompt(turn: dict[str, Any]) -> None:
    for row in (
        {"messages": [turn, *TALK[1:]]},
        {"messages": [*TALK[:2], turn, *TALK[3:]]},
        {"prompt": [turn], "completion": "a1"},
        {"prompt": [turn], "chosen": "a", "rejected": "b"},
        {"chosen": [turn, assistant("a")], "rejected": [turn, assistant("b")]},
    ):
        made = record(row, "f:1", Counter())
        assert isinstance(made, Skipped), made
        assert made.why == NO_PROMPT
        assert "the user's, has no text" in made.detail
    assert isinstance(record({"prompt": [user("q1")], "chosen": "a", "rejected": "b"}, "f:1", Counter()), Preference)
