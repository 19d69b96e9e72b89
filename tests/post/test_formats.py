"""Rows of each tool's files, as they are documented there, and what becomes of bad ones."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from qwen2.post.rows.formats import EMPTY_ANSWER, EQUAL, HALF, NO_ANSWER, NO_PROMPT, SEVERAL, record
from qwen2.post.rows.records import Example, PlainText, Preference, Skipped
from qwen2.post.rows.turns import BROKEN, HAS_MEDIA, NO_KNOWN_FORMAT, UNKNOWN_ROLE


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


AQI = {"type": "function", "function": {"name": "aqi", "description": "Air quality.", "parameters": {"type": "object", "properties": {}}}}
TALK = [user("q1"), assistant("a1"), user("q2"), assistant("a2")]

CONVERSATIONS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    # LLaMA-Factory
    "alpaca": (
        {"instruction": "Add.", "input": "1+1", "output": "2", "system": "S", "history": [["q1", "a1"]]},
        [system("S"), user("q1"), assistant("a1"), user("Add.\n1+1"), assistant("2")],
    ),
    "alpaca-no-input": ({"instruction": "Hi", "input": "", "output": "Hello"}, [user("Hi"), assistant("Hello")]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}], "system": "S", "tools": "[]"},
        [system("S"), user("q1"), assistant("a1")],
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "q1"}]},
                {"role": "assistant", "content": [{"type": "text", "value": "a1"}]},
            ]
        },
        [user("q1"), assistant("a1")],
    ),
    # OpenAI
    "messages": ({"messages": [system("S"), *TALK]}, [system("S"), *TALK]),
    "developer": ({"messages": [{"role": "developer", "content": "S"}, *TALK]}, [system("S"), *TALK]),
    "nulls": (
        {"messages": [user("q1") | {"tool_calls": None, "name": None}, assistant("a1", tool_calls=None)]},
        [user("q1"), assistant("a1")],
    ),
    "prompt-completion": ({"prompt": "q1", "completion": "a1"}, [user("q1"), assistant("a1")]),
    "a-number": ({"prompt": "1+1", "completion": 2}, [user("1+1"), assistant("2")]),
    # trl
    "prompt-completion-messages": (
        {"prompt": [system("S"), user("q1")], "completion": [assistant("a1")]},
        [system("S"), user("q1"), assistant("a1")],
    ),
    "history-before-messages": (
        {"history": [["q0", "a0"]], "prompt": [user("q1")], "completion": "a1"},
        [user("q0"), assistant("a0"), user("q1"), assistant("a1")],
    ),
    "history-below-a-system-prompt": (
        {"history": [["q0", "a0"]], "prompt": [system("S"), user("q1")], "completion": [assistant("a1")]},
        [system("S"), user("q0"), assistant("a0"), user("q1"), assistant("a1")],
    ),
    # Axolotl
    "conversations-role-content": ({"conversations": TALK}, TALK),
    "pygmalion": ({"conversations": [{"role": "human", "value": "q1"}, {"role": "bot", "value": "a1"}]}, [user("q1"), assistant("a1")]),
    "orca": ({"system_prompt": "S", "question": "q1", "response": "a1"}, [system("S"), user("q1"), assistant("a1")]),
    "jeopardy": ({"question": "q1", "answer": "a1"}, [user("q1"), assistant("a1")]),
    "oasst": ({"INSTRUCTION": "q1", "RESPONSE": "a1"}, [user("q1"), assistant("a1")]),
    "gpteacher": ({"instruction": "q1", "input": "c", "response": "a1"}, [user("q1\nc"), assistant("a1")]),
    "context-qa": ({"context": "c", "question": "q1", "answer": "a1"}, [user("q1\nc"), assistant("a1")]),
    "tldr": ({"article": "long", "summary": "short"}, [user("long"), assistant("short")]),
    "metharme": ({"prompt": "q1", "generation": "a1"}, [user("q1"), assistant("a1")]),
    "camel": ({"message_1": "q1", "message_2": "a1"}, [user("q1"), assistant("a1")]),
    "completion-of-both": ({"completion": [user("q1"), assistant("a1")]}, [user("q1"), assistant("a1")]),
    # ms-swift
    "query-response": (
        {"system": "S", "query": "q2", "response": "a2", "history": [["q1", "a1"]]},
        [system("S"), *TALK],
    ),
    "swift-sharegpt": (
        {"system": "S", "conversation": [{"human": "q1", "assistant": "a1"}, {"human": "q2", "assistant": "a2"}]},
        [system("S"), *TALK],
    ),
    # Firefly
    "firefly": (
        {"conversation_id": 44, "category": "c", "conversation": [{"human": "q1", "assistant": "a1"}]},
        [user("q1"), assistant("a1")],
    ),
    "firefly-1.1M": ({"kind": "Couplet", "input": "q1", "target": "a1"}, [user("q1"), assistant("a1")]),
    # XTuner, UltraChat, Dolly, MetaMath-like
    "xtuner": ({"conversation": [{"system": "S", "input": "q1", "output": "a1"}]}, [system("S"), user("q1"), assistant("a1")]),
    "bare-texts": ({"dialogue": ["q1", "a1", "q2", "a2"]}, TALK),
    "ultrachat": ({"id": "7", "data": ["q1", "a1", "q2", "a2"]}, TALK),
    "dolly": ({"instruction": "q1", "context": "c", "response": "a1", "category": "x"}, [user("q1\nc"), assistant("a1")]),
    "problem-solution": ({"problem": "q1", "solution": "a1", "answer": "7"}, [user("q1"), assistant("a1")]),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_of_each_format(name: str) -> None:
    row, messages = CONVERSATIONS[name]
    made = record(row, "f:1", Counter())
    assert made == Example(messages, None, "f:1"), made


@pytest.mark.parametrize(
    ("row", "messages", "tools"),
    [
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "aqi", "arguments": {"city": "B"}}'},
                    {"from": "observation", "value": '{"aqi": 10}'},
                    {"from": "gpt", "value": "Good."},
                ],
                "tools": json.dumps([AQI["function"]]),
            },
            [
                user("q"),
                assistant("", tool_calls=[call("aqi", {"city": "B"})]),
                {"role": "tool", "content": '{"aqi": 10}'},
                assistant("Good."),
            ],
            [AQI],
            id="llama-factory",
        ),
        pytest.param(
            {
                "tools": json.dumps([AQI]),
                "messages": [
                    user("q"),
                    {"role": "assistant", "content": "Let me see."},
                    {"role": "tool_call", "content": '{"name": "aqi", "arguments": {"city": "B"}}'},
                    {"role": "tool_call", "content": '{"name": "aqi", "arguments": {"city": "S"}}'},
                    {"role": "tool_response", "content": "10"},
                    {"role": "tool", "content": "72"},
                    assistant("Good."),
                ],
            },
            [
                user("q"),
                assistant("Let me see.", tool_calls=[call("aqi", {"city": "B"}), call("aqi", {"city": "S"})]),
                {"role": "tool", "content": "10"},
                {"role": "tool", "content": "72"},
                assistant("Good."),
            ],
            [AQI],
            id="ms-swift-parallel",
        ),
        pytest.param(
            {
                "tools": [AQI],
                "parallel_tool_calls": False,
                "messages": [
                    user("q"),
                    {"role": "assistant", "content": None, "tool_calls": [call("aqi", '{"city":  "B"}', id="c1")]},
                    {"role": "tool", "tool_call_id": "c1", "content": {"aqi": 10}},
                    assistant("Good."),
                ],
            },
            [
                user("q"),
                assistant("", tool_calls=[call("aqi", '{"city":  "B"}', id="c1")]),
                {"role": "tool", "content": '{"aqi": 10}', "tool_call_id": "c1"},
                assistant("Good."),
            ],
            [AQI],
            id="openai",
        ),
        pytest.param(
            {
                "functions": [AQI["function"]],
                "messages": [
                    user("q"),
                    {"role": "assistant", "function_call": {"name": "aqi", "arguments": "{}"}},
                    {"role": "function", "name": "aqi", "content": "10"},
                    assistant("Good."),
                ],
            },
            [
                user("q"),
                assistant("", tool_calls=[call("aqi", "{}")]),
                {"role": "tool", "content": "10", "name": "aqi"},
                assistant("Good."),
            ],
            [AQI],
            id="openai-functions",
        ),
    ],
)
def test_calls_of_tools(row: dict[str, Any], messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    assert record(row, "f:1", Counter()) == Example(messages, tools, "f:1")


PREFERENCES: dict[str, dict[str, Any]] = {
    "llama-factory-alpaca": {"instruction": "q1", "input": "", "chosen": "good", "rejected": "bad"},
    "llama-factory-ranking": {"instruction": "q1", "input": "", "output": ["good", "bad"]},
    "llama-factory-ranking-prompt": {"prompt": "q1", "output": ["good", "bad"]},
    "llama-factory-sharegpt": {
        "conversations": [{"from": "human", "value": "q1"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "llama-factory-v1": {"chosen_messages": [user("q1"), assistant("good")], "rejected_messages": [user("q1"), assistant("bad")]},
    "trl": {"prompt": [user("q1")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
    "trl-implicit": {"chosen": [user("q1"), assistant("good")], "rejected": [user("q1"), assistant("bad")]},
    "ultrafeedback": {
        "prompt": "q1",
        "chosen": [user("q1"), assistant("good")],
        "rejected": [user("q1"), assistant("bad")],
        "messages": [user("q1"), assistant("good")],
    },
    "hh": {"chosen": "\n\nHuman: q1\n\nAssistant: good", "rejected": "\n\nHuman: q1\n\nAssistant: bad"},
    "axolotl-intel": {"question": "q1", "chosen": "good", "rejected": "bad"},
    "axolotl-argilla": {"instruction": "q1", "chosen_response": "good", "rejected_response": "bad"},
    "axolotl-icr": {"input": "q1", "chosen": "good", "rejected": "bad"},
    "axolotl-chat": {"messages": [user("q1")], "chosen": assistant("good"), "rejected": assistant("bad")},
    "ms-swift": {"messages": [user("q1"), assistant("good")], "rejected_response": "bad"},
    "ms-swift-messages": {"messages": [user("q1"), assistant("good")], "rejected_messages": [user("q1"), assistant("bad")]},
    "openai": {"input": {"messages": [user("q1")]}, "preferred_output": [assistant("good")], "non_preferred_output": [assistant("bad")]},
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_of_each_format(name: str) -> None:
    made = record(PREFERENCES[name], "f:1", Counter())
    assert made == Preference([user("q1")], [assistant("good")], [assistant("bad")], None, "f:1"), made


def test_a_list_of_answers_says_what_to_do() -> None:
    made = record({"question": "q1", "answer": ["Paris", "City of Light"]}, "f:1", Counter())
    assert isinstance(made, Skipped)
    assert "answer is a list of 2: write the one to learn as a text, or a better and a worse one as chosen and rejected" in made.detail


def test_ranked_answers_beside_a_pair_are_a_column_without_use() -> None:
    unused: Counter[str] = Counter()
    made = record({"instruction": "q1", "chosen": "good", "rejected": "bad", "output": ["x", "y"]}, "f:1", unused)
    assert isinstance(made, Preference)
    assert made.rejected == [assistant("bad")]
    assert unused == {"output": 1}


def test_of_a_preference_the_chosen_answer_is_learned() -> None:
    made = record({"messages": [*TALK, user("q3")], "chosen": "good", "rejected": "bad"}, "f:1", Counter())
    assert isinstance(made, Preference)
    assert made.example() == Example([*TALK, user("q3"), assistant("good")], None, "f:1", untrained=(1, 3))


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"label": False}, False),
        ({"kto_tag": True}, True),
        ({"label": 1}, True),
        ({"label": 0}, False),
        ({"label": 0.0}, False),
        ({"kto_tag": "False"}, False),
        ({"label": "true"}, True),
        ({"label": 2}, None),
        ({"label": "sports"}, None),
        ({"label": None}, None),
        ({}, None),
    ],
)
def test_whether_an_answer_is_wanted(row: dict[str, Any], label: bool | None) -> None:
    made = record({"messages": TALK, **row}, "f:1", Counter())
    assert isinstance(made, Example)
    assert made.label is label


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("loss", False), ("loss_weight", 0.0), ("train", False)])
def test_answers_that_are_not_to_be_learned(key: str, value: object) -> None:
    made = record({"messages": [user("q1"), assistant("a1") | {key: value}, user("q2"), assistant("a2")]}, "f:1", Counter())
    assert isinstance(made, Example)
    assert made.untrained == (1,)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "A document."}, "A document."),
        ({"content": "A document.", "url": "x"}, "A document."),
        ({"messages": [assistant("A document.")]}, "A document."),  # pre-training data of ms-swift
    ],
)
def test_plain_texts(row: dict[str, Any], text: str) -> None:
    assert record(row, "f:1", Counter()) == PlainText(text, "f:1")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        pytest.param([1, 2], NO_KNOWN_FORMAT, id="no-object"),
        pytest.param({}, NO_KNOWN_FORMAT, id="no-keys"),
        pytest.param({"a": 1}, NO_KNOWN_FORMAT, id="other-keys"),
        pytest.param({"segments": [{"label": True, "text": "x"}]}, NO_KNOWN_FORMAT, id="segments"),
        pytest.param({"messages": "not JSON"}, BROKEN, id="text-for-messages"),
        pytest.param({"messages": [1]}, NO_KNOWN_FORMAT, id="a-number-for-a-turn"),
        pytest.param({"messages": []}, BROKEN, id="no-turns"),
        pytest.param({"messages": [user("q1")]}, NO_ANSWER, id="no-answer"),
        pytest.param({"prompt": "q1"}, NO_ANSWER, id="prompt-alone"),
        pytest.param({"messages": [user("q1"), assistant("a1", weight=0)]}, NO_ANSWER, id="no-answer-that-counts"),
        pytest.param({"messages": [user("q1"), assistant("a1", weight=0.5)]}, "a weight between 0 and 1", id="half-a-weight"),
        pytest.param({"messages": [user("q1"), assistant("")]}, EMPTY_ANSWER, id="empty"),
        pytest.param({"messages": [user("q1"), assistant(" \n")]}, EMPTY_ANSWER, id="blank"),
        pytest.param({"prompt": "q1", "completion": ""}, EMPTY_ANSWER, id="empty-completion"),
        pytest.param({"question": "q1", "answer": ["Paris", "City of Light"]}, SEVERAL, id="answers"),
        pytest.param({"question": "q1", "answer": ["Paris"]}, SEVERAL, id="a-list-of-one"),
        pytest.param({"instruction": "q1", "output": ["a", "b", "c"]}, SEVERAL, id="three-ranked"),
        pytest.param({"prompt": "q1", "completion": ["a", "b", "c", "d"]}, SEVERAL, id="four-samples"),
        pytest.param({"completion": ["q1", "a1"]}, SEVERAL, id="texts-without-a-prompt"),
        pytest.param({"prompt": "q1", "chosen": ["a", "b"], "rejected": ["c"]}, SEVERAL, id="sides-of-several"),
        pytest.param({"instruction": "q1", "output": ["same", "same"]}, EQUAL, id="ranked-equal"),
        pytest.param({"prompt": "", "completion": "a1"}, NO_PROMPT, id="empty-prompt"),
        pytest.param({"messages": [user("q1"), {"role": "narrator", "content": "x"}, assistant("a1")]}, UNKNOWN_ROLE, id="role"),
        pytest.param({"conversations": [{"from": 7, "value": "q1"}]}, UNKNOWN_ROLE, id="role-number"),
        pytest.param({"messages": [user("q1"), assistant("a1")], "images": ["a.png"]}, HAS_MEDIA, id="images"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, assistant("a1")]},
            HAS_MEDIA,
            id="image-part",
        ),
        pytest.param({"messages": [user("q1"), {"role": "tool_call", "content": "{"}]}, BROKEN, id="call-not-json"),
        pytest.param({"messages": [user("q1"), assistant("", tool_calls=[call("aqi", "[1]")])]}, BROKEN, id="arguments-no-object"),
        *(
            pytest.param({"messages": [user("q1"), assistant("x", tool_calls=calls)]}, BROKEN, id=f"calls-{calls}")
            for calls in (5, True, "5")
        ),
        pytest.param({"messages": TALK, "tools": "[{"}, BROKEN, id="tools-not-json"),
        pytest.param({"messages": TALK, "tools": [{"name": "a b"}]}, BROKEN, id="tool-name"),
        pytest.param({"prompt": "q1", "chosen": "same", "rejected": "same"}, EQUAL, id="equal-sides"),
        pytest.param({"chosen": [user("q1"), assistant("a")], "rejected": [user("q1"), assistant("a")]}, EQUAL, id="equal-conversations"),
        pytest.param({"chosen": "a", "rejected": "b"}, NO_PROMPT, id="pair-without-prompt"),
        pytest.param({"prompt": "q1", "chosen": "a", "rejected": ""}, EMPTY_ANSWER, id="empty-side"),
        pytest.param({"text": " "}, "an empty text", id="empty-text"),
        pytest.param({"prompt": "q1", "completion": float("nan")}, BROKEN, id="nan"),
        pytest.param({"prompt": "q1", "completion": float("inf")}, BROKEN, id="infinity"),
        pytest.param({"prompt": "q1", "input": float("nan"), "completion": "a1"}, BROKEN, id="nan-for-an-input"),
        pytest.param({"prompt": "q1", "completion": "\ud800 x"}, HALF, id="half-a-character"),
        pytest.param({"text": "\ud800"}, HALF, id="half-a-character-of-a-text"),
        pytest.param({"prompt": "q1", "chosen": "a", "rejected": "\udc00"}, HALF, id="half-a-character-of-a-side"),
        pytest.param(
            {"messages": [user("q1"), assistant("", tool_calls=[call("aqi", {"c": "\ud800"})])]}, HALF, id="half-a-character-of-a-call"
        ),
    ],
)
def test_what_cannot_be_used_is_skipped_with_the_reason(row: object, why: str) -> None:
    made = record(row, "f:1", Counter())
    assert isinstance(made, Skipped), made
    assert (made.why, made.where) == (why, "f:1")


def test_a_system_prompt_beside_the_conversations_own_is_named() -> None:
    unused: Counter[str] = Counter()
    made = record({"system": "other", "messages": [system("S"), *TALK]}, "f:1", unused)
    assert made == Example([system("S"), *TALK], None, "f:1")
    assert unused == {"system": 1}


def test_history_keeps_which_answers_are_learned() -> None:
    history = [user("q0"), assistant("a0", weight=0)]
    prompt = [system("S"), user("q1"), assistant("a1", weight=0), user("q2"), assistant("a2"), user("q3")]
    made = record({"history": history, "prompt": prompt, "completion": "a3"}, "f:1", Counter())
    assert isinstance(made, Example)
    assert [made.messages[i]["content"] for i in made.untrained] == ["a0", "a1"]


def test_a_pair_of_surrogates_is_a_character() -> None:
    made = record(json.loads('{"text": "\\ud83d\\ude00"}'), "f:1", Counter())
    assert made == PlainText("\U0001f600", "f:1")


def test_columns_that_nothing_was_made_of_are_named() -> None:
    unused: Counter[str] = Counter()
    record({"messages": [user("q1") | {"mood": "gay"}, assistant("a1")], "provenance": {}, "score": 1}, "f:1", unused)
    record({"messages": TALK, "score": 2}, "f:2", unused)
    assert unused == {"provenance": 1, "score": 2, "messages[].mood": 1}
