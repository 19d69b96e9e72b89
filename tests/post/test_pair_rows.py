"""Rows with two answers: where the better one stands, prompts that have an answer already, answers with a weight."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from qwen2.post.rows.formats import ANSWERED, EQUAL, NO_ANSWER, OTHER_PROMPT, WEIGHTLESS, record
from qwen2.post.rows.records import Example, Preference, Skipped
from tests.post.test_formats import AQI, TALK, assistant, call, system, user

CALLS = [assistant("", tool_calls=[call("aqi", {"city": "B"})]), {"role": "tool", "content": "10"}]
PAIRS: dict[str, tuple[dict[str, Any], tuple[list[Any], list[Any], list[Any]]]] = {  # a row; prompt, chosen, rejected
    "query-response": ({"query": "q1", "response": "a", "rejected_response": "b"}, ([user("q1")], [assistant("a")], [assistant("b")])),
    "query-response-of-several-turns": (
        {"system": "S", "history": [["q1", "a1"]], "query": "q2", "response": "a", "rejected_response": "b"},
        ([system("S"), *TALK[:3]], [assistant("a")], [assistant("b")]),
    ),
    "instruction-output": (
        {"instruction": "q1", "input": "c", "output": "a", "rejected_response": "b"},
        ([user("q1\nc")], [assistant("a")], [assistant("b")]),
    ),
    "conversations-that-part-at-the-first-answer": (
        {"messages": TALK, "rejected_messages": [user("q1"), assistant("b1"), user("q2"), assistant("b2")]},
        ([user("q1")], TALK[1:], [assistant("b1"), user("q2"), assistant("b2")]),
    ),
    "conversations-that-part-at-the-last-answer": (
        {"messages": [system("S"), *TALK], "rejected_messages": [*TALK[:3], assistant("b2")]},
        ([system("S"), *TALK[:3]], [assistant("a2")], [assistant("b2")]),
    ),
    "a-worse-answer-with-a-call": (
        {"messages": [user("q1"), assistant("a")], "rejected_messages": [*CALLS, assistant("b")], "tools": [AQI]},
        ([user("q1")], [assistant("a")], [*CALLS, assistant("b")]),
    ),
    "a-prompt-that-ends-with-the-chosen-answer": (
        {"messages": [user("q1"), assistant("a")], "chosen": "a", "rejected": "b"},
        ([user("q1")], [assistant("a")], [assistant("b")]),
    ),
    "a-prompt-that-ends-with-the-rejected-answer": (
        {
            "conversations": [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "b\n"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        ([user("q1")], [assistant("a")], [assistant("b")]),
    ),
    "a-prompt-that-ends-with-all-of-an-answer": (
        {"messages": [*TALK[:3], *CALLS, assistant("b")], "tools": [AQI], "chosen": "a", "rejected": [*CALLS, assistant("b")]},
        (TALK[:3], [assistant("a")], [*CALLS, assistant("b")]),
    ),
    "whole-conversations-beside-their-prompt-and-its-system": (
        {"prompt": [system("S"), user("q1")], "chosen": [user("q1"), assistant("a")], "rejected": [user("q1"), assistant("b")]},
        ([system("S"), user("q1")], [assistant("a")], [assistant("b")]),
    ),
    "whole-conversations-with-a-system-of-their-own": (
        {"prompt": [user("q1 ")], **{side: [system("S"), user("q1"), assistant(side)] for side in ("chosen", "rejected")}},
        ([system("S"), user("q1")], [assistant("chosen")], [assistant("rejected")]),
    ),
    "whole-conversations-beside-one-of-them-and-a-question": (
        {"prompt": "q2", "messages": TALK, "chosen": TALK, "rejected": [*TALK[:3], assistant("b")]},
        (TALK[:3], TALK[3:], [assistant("b")]),
    ),
    "weights-before-the-answer-and-of-the-rejected-one": (
        {"messages": [user("q1"), assistant("a1", weight=0), user("q2")], "chosen": "a", "rejected": assistant("b", weight=0)},
        (TALK[:3], [assistant("a")], [assistant("b")]),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_wherever_its_answers_stand(name: str) -> None:
    row, (messages, chosen, rejected) = PAIRS[name]
    unused: Counter[str] = Counter()
    made = record(row, "f:1", unused)
    assert isinstance(made, Preference), made
    assert (made.messages, made.chosen, made.rejected) == (messages, chosen, rejected)
    assert not unused


@pytest.mark.parametrize(
    ("row", "why"),
    [
        pytest.param({"messages": [user("q1"), assistant("x")], "chosen": "a", "rejected": "b"}, ANSWERED, id="another-answer"),
        pytest.param(
            {"prompt": [user("q1"), assistant("x")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, ANSWERED, id="of-a-prompt"
        ),
        pytest.param({"prompt": "q1", "chosen": assistant("a", weight=0), "rejected": "b"}, WEIGHTLESS, id="chosen-without-weight"),
        pytest.param(
            {"chosen": [user("q1"), assistant("a", train="false")], "rejected": [user("q1"), assistant("b")]}, WEIGHTLESS, id="whole"
        ),
        pytest.param({"messages": [user("q1"), assistant("a", weight=0)], "rejected_response": "b"}, WEIGHTLESS, id="beside-a-worse"),
        pytest.param(
            {"prompt": [user("q2")], "chosen": [user("q1"), assistant("a")], "rejected": [user("q1"), assistant("b")]},
            OTHER_PROMPT,
            id="whole-conversations-with-another-prompt",
        ),
        pytest.param({"messages": TALK, "rejected_messages": TALK}, EQUAL, id="equal"),
        pytest.param({"messages": [user("q1")], "rejected_messages": [user("q1"), assistant("b")]}, NO_ANSWER, id="no-better-one"),
        pytest.param({"query": "q1", "rejected_response": "b"}, NO_ANSWER, id="no-better-one-of-a-query"),
    ],
)
def test_pairs_that_cannot_be_used(row: dict[str, Any], why: str) -> None:
    made = record(row, "f:1", Counter())
    assert isinstance(made, Skipped), made
    assert made.why == why


@pytest.mark.parametrize(
    ("prompt", "completion", "messages"),
    [
        ("q1 ", [user("q1"), assistant("a1")], TALK[:2]),
        ([user("q1")], [system("S"), user("q1"), assistant("a1")], [system("S"), *TALK[:2]]),
        ([system("S"), user("q1")], [user("q1"), assistant("a1")], [system("S"), *TALK[:2]]),
        (TALK[:3], TALK, TALK),
        (TALK[:3], TALK[2:], TALK),
        ([user("q1"), assistant("a1", weight=0), user("q2")], [user("q2"), assistant("a2")], TALK),
        ([system("S")], TALK, [system("S"), *TALK]),
    ],
)
def test_a_completion_that_is_the_whole_conversation_says_the_prompt_once(prompt: Any, completion: Any, messages: list[Any]) -> None:
    """Rows of KTO among them: a text as the prompt, and behind it both turns."""
    made = record({"prompt": prompt, "completion": completion, "label": True}, "f:1", Counter())
    assert isinstance(made, Example), made
    assert (made.messages, made.label) == (messages, True)
    assert made.untrained == ((1,) if "weight" in str(prompt) else ())
