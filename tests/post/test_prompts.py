"""Prompts of every shape that files have, and what is broken in them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwen2.post.checks.checkers import make_checker
from qwen2.post.rows.formats import record
from qwen2.post.rows.readers import read
from qwen2.post.rows.records import Example, Preference
from qwen2.post.synth.prompts import Prompts, read_prompts

NUMBER = make_checker("number")


def prompts_of(tmp_path: Path, *rows: Any, **options: Any) -> Prompts:
    path = tmp_path / "p.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return read_prompts([path], options.pop("checker", NUMBER), **options)


USER = [{"role": "user", "content": "1 + 1?"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 1?", "answer": 2},
        {"prompt": USER, "answer": "2"},
        {"question": "1 + 1?", "answer": "One and one.\n#### 2"},
        {"problem": "1 + 1?", "answer": "$\\boxed{2}$"},
        {"instruction": "1 + 1?", "input": "", "answer": 2},
        {"messages": USER, "answer": 2},
        {"messages": [*USER, {"role": "assistant", "content": "It is 2"}]},
    ],
)
def test_shapes(row: dict[str, Any], tmp_path: Path) -> None:
    (prompt,) = prompts_of(tmp_path, row).found
    assert (prompt.messages, prompt.where) == (USER, f"{tmp_path / 'p.jsonl'}:1")
    assert NUMBER.check("2", prompt.row).right


def test_more_of_a_row(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 and 1", "answer": 2, "source": "s", "language": "de", "id": 5, "difficulty": 3}
    found = prompts_of(tmp_path, row, system="Be brief.")
    (prompt,) = found.found
    assert [message["content"] for message in prompt.messages] == ["Be brief.", "Add.\n1 and 1"]
    trained = record({**row, "output": "2"}, "here", Counter())
    assert isinstance(trained, Example)
    assert trained.messages[0] == prompt.messages[1]  # what is asked is what training on the same row has
    assert (prompt.source, prompt.language, found.unused) == ("s", "de", ("difficulty",))
    own = prompts_of(tmp_path, {"prompt": [{"role": "system", "content": "Mine."}, *USER], "answer": 2}, system="Be brief.").found[0]
    assert own.messages[0]["content"] == "Mine."


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
PAST = [{"role": "user", "content": "0 + 1?"}, {"role": "assistant", "content": "1"}]
ANYTHING = f"{Path(__file__)}:anything"


def anything(answer: str, row: dict[str, Any]) -> bool:
    """A checker that says of no column what it is."""
    return bool(answer)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "And 2 more?", "history": [["0 + 1?", "1"]], "output": "3"},
        {"instruction": "Add.", "input": "1 and 1", "output": "2", "system": "Be brief."},
        {"question": "How many?", "context": "Two birds sit there.", "answer": "2"},
        {"query": "1 + 1?", "response": "2", "history": [["0 + 1?", "1"]]},
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1?"}, {"from": "gpt", "value": "1"}]},
        {"conversation": [{"human": "0 + 1?", "assistant": "1"}, {"human": "1 + 1?", "assistant": "2"}]},
        {"messages": [*PAST, *USER, {"role": "assistant", "content": "2"}], "tools": [ADD]},
        {"messages": [*USER, CALL, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "1"}], "tools": json.dumps([ADD])},
        {"prompt": [*PAST, *USER], "completion": [{"role": "assistant", "content": "2"}]},
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "3", "system": "Be brief."},
        {"conversations": [{"from": "human", "value": "1 + 1?"}], "chosen": {"value": "2", "from": "gpt"}, "rejected": {"value": "3", "from": "gpt"}},
        {"chosen": [*USER, {"role": "assistant", "content": "2"}], "rejected": [*USER, {"role": "assistant", "content": "3"}]},
        {"messages": [*USER, {"role": "assistant", "content": "2"}], "rejected_response": "3"},
    ],
)  # fmt: skip
def test_what_is_asked_is_what_training_on_the_row_reads_before_its_answer(row: dict[str, Any], tmp_path: Path) -> None:
    trained = record(row, "here", Counter())
    assert isinstance(trained, Example | Preference)
    before = trained.messages if isinstance(trained, Preference) else trained.messages[:-1]
    last = (trained.chosen if isinstance(trained, Preference) else trained.messages)[-1]
    for checker in (NUMBER, make_checker(ANYTHING)):
        (prompt,) = prompts_of(tmp_path, row, checker=checker).found
        assert (prompt.messages, prompt.tools) == (before, trained.tools)
        assert prompt.row["answer"] == last["content"]
        checker.close()
    bare = [name for name in ("output", "response", "completion", "answer") if name in row]
    if bare:
        (prompt,) = prompts_of(tmp_path, {name: value for name, value in row.items() if name not in bare} | {"answer": 7}).found
        assert (prompt.messages, prompt.tools, prompt.row["answer"]) == (before, trained.tools, 7)


def test_tools_tell_prompts_apart(tmp_path: Path) -> None:
    found = prompts_of(tmp_path, *({"messages": USER, "answer": 2} | tools for tools in ({}, {"tools": [ADD]}, {"tools": []})))
    assert ([prompt.tools for prompt in found.found], found.repeated) == ([None, [ADD]], 1)


def test_columns_of_a_conversation_that_nothing_is_made_of_are_named(tmp_path: Path) -> None:
    row = {"messages": [{**USER[0], "mood": "gay"}], "answer": 2, "solution": "1 and 1", "difficulty": 3}
    assert prompts_of(tmp_path, row).unused == ("difficulty", "messages[].mood", "solution")
    named = prompts_of(tmp_path, {"ask": "1 + 1?", "prompt": "Never read.", "input": "Be brief.", "answer": 2}, prompt_column="ask")
    assert (named.found[0].messages[0]["content"], named.unused) == ("1 + 1?\nBe brief.", ("prompt",))


def test_what_training_learns_is_nothing_to_a_prompt(tmp_path: Path) -> None:
    before = [{"role": "user", "content": "0 + 1?"}, {"role": "assistant", "content": "1", "weight": 0}]
    (prompt,) = prompts_of(tmp_path, {"messages": [*before, *USER, {"role": "assistant", "content": "2", "weight": 1}]}).found
    assert prompt.messages == [before[0], {"role": "assistant", "content": "1"}, *USER]


def test_columns_by_name(tmp_path: Path) -> None:
    found = prompts_of(tmp_path, {"ask": "1 + 1?", "gold": 2}, prompt_column="ask", answer_column="gold")
    assert (found.found[0].messages, found.found[0].row["answer"], found.unused) == (USER, 2, ())
    with pytest.raises(ValueError, match=r"p.jsonl:1: the column gold is missing"):
        prompts_of(tmp_path, {"ask": "1 + 1?"}, prompt_column="ask", answer_column="gold")
    with pytest.raises(ValueError, match=r"nothing is asked: a row needs ask; it has answer, prompt"):
        prompts_of(tmp_path, {"prompt": "1 + 1?", "answer": 2}, prompt_column="ask")


def test_an_array_and_repetitions(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(
        json.dumps([{"prompt": "1 + 1?", "answer": 2}, {"question": "1 + 1?", "answer": 3}, {"prompt": "2 + 2?", "answer": 4}], indent=1)
    )
    found = read_prompts([path], NUMBER)
    assert ([prompt.where for prompt in found.found], found.repeated) == ([f"{path}:1", f"{path}:3"], 1)
    assert found.found[0].row["answer"] == 2


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("lines", [False, True])
def test_a_byte_order_mark_is_dropped_as_training_drops_it(lines: bool, indent: int | None, tmp_path: Path) -> None:
    listed = [{"prompt": "1 + 1?", "answer": 2, "output": "2"}, {"prompt": "2 + 2?", "answer": 4, "output": "4"}]
    text = "\n" * (indent or 0) + ("\n".join(map(json.dumps, listed)) if lines else json.dumps(listed, indent=indent))
    for mark in ("", "\ufeff"):
        (tmp_path / "p.json").write_text(mark + text, encoding="utf-8")
        assert [prompt.messages[0]["content"] for prompt in read_prompts([tmp_path / "p.json"], NUMBER).found] == ["1 + 1?", "2 + 2?"]
        assert all(isinstance(one, Example) for one in read(tmp_path / "p.json"))


def test_a_source_or_language_of_nothing_is_none(tmp_path: Path) -> None:
    row = {"prompt": "1 + 1?", "answer": 2}
    found = prompts_of(tmp_path, {**row, "source": None, "language": None}, {**row, "prompt": "2?", "source": 7, "language": "de"}).found
    assert [(prompt.source, prompt.language) for prompt in found] == [("", ""), ("7", "de")]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{broken", "no JSON: "),
        ("[1, 2]\n{}", "begins as a JSON array and is none"),
        ("7", "no JSON object"),
        ({}, "nothing is asked: a row needs messages or prompt or question or problem or instruction"),
        ({"prompt": True, "answer": 2}, "prompt is bool, not text"),
        ({"prompt": "", "answer": 2}, "no prompt: prompt is empty"),
        ({"prompt": [], "answer": 2}, "no prompt"),
        ({"prompt": " ", "answer": 2}, "no prompt"),
        ({"prompt": [{"role": "boss", "content": "x"}], "answer": 2}, r"an unknown role: prompt\[0\] is of 'boss'"),
        ({"messages": [{"role": "boss", "content": "x"}], "answer": 2}, r"an unknown role: messages\[0\] is of 'boss'"),
        ({"prompt": "What is this?", "images": ["a.png"], "answer": 2}, "images, audio or video"),
        ({"prompt": "1 + 1?", "tools": "add", "answer": 2}, "tools is text that is not JSON"),
        ({"prompt": [{"role": "system", "content": "x"}], "answer": 2}, "the last message is the system's: nothing is asked"),
        ({"messages": [{"role": "assistant", "content": "2"}]}, "only the assistant speaks: nothing is asked"),
        ({"messages": [*USER, *[{"role": "assistant", "content": "2"}] * 2]}, "the last message is the assistant's: nothing is asked"),
        ({"prompt": "1 + 1?"}, "the column answer is missing"),
        ({"prompt": "1 + 1?", "answer": "two"}, "'two' has no number"),
        ('{"prompt": "\\ud800", "answer": 2}', "half a character"),
    ],
)
def test_broken_rows(row: Any, why: str, tmp_path: Path) -> None:
    good = {"prompt": "1 + 1?", "answer": 2}
    with pytest.raises(ValueError, match=why) as raised:
        prompts_of(tmp_path, row, row, good)
    assert "p.jsonl:1: " in str(raised.value) or "p.jsonl: begins" in str(raised.value)
    if not str(row).startswith("["):
        assert "(rows that are broken: 2; mend them, or leave them out with --skip-broken)" in str(raised.value)
        found = prompts_of(tmp_path, row, row, good, skip_broken=True)
        assert (len(found.found), found.broken.total()) == (1, 2)


def test_files_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_prompts([tmp_path / "gone.jsonl"], NUMBER)
    with pytest.raises(ValueError, match=r"p.jsonl: no prompts$"):
        prompts_of(tmp_path, "")
    with pytest.raises(ValueError, match=r"no prompts; .*p.jsonl:1: no JSON object"):
        prompts_of(tmp_path, "7", skip_broken=True)
    (tmp_path / "p.json").write_text("[{")
    with pytest.raises(ValueError, match=r"p.json: begins as a JSON array and is none"):
        read_prompts([tmp_path / "p.json"], NUMBER)
