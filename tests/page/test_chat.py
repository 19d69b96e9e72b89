"""A conversation: answers, branches, errors."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.page.conftest import Chat, Served

LONG = " ".join(f"word{number}" for number in range(200))
CODE = """Intervals that overlap are merged in one pass over the **sorted** list:

```python
def merge(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    \"\"\"Sorted, without overlaps.\"\"\"
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
```

It costs $O(n \\log n)$ for the sorting:

1. sort by where they begin,
2. extend the last one, or begin another.

| input | output |
|---|---|
| `[(1, 3), (2, 6)]` | `[(1, 6)]` |
| `[]` | `[]` |
"""


def test_from_empty_to_an_answer(chat: Chat) -> None:
    expect(chat.page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    expect(chat.page.locator("#send")).to_be_disabled()
    chat.picture("empty")
    chat.served.script["Merge intervals"] = CODE
    chat.send("Merge intervals")
    expect(chat.page.locator("#empty")).to_be_hidden()
    chat.finished()
    expect(chat.answer.locator("code .hljs-keyword").first).to_have_text("def")
    expect(chat.answer.locator("strong")).to_have_text("sorted")
    expect(chat.answer.locator("td")).to_have_count(4)
    stats = chat.messages.nth(1).locator(".stats")
    expect(stats).to_have_text(re.compile(r"^[\d.]+ tok/s . [\d.]+ s to first token . \d+ tokens$"))
    expect(chat.entries).to_have_text(["Merge intervals"])
    expect(chat.draft).to_be_focused()
    expect(chat.page.locator("#announcer")).to_have_text("Answer finished")
    chat.picture("code")


def test_stop_keeps_what_came_and_continue_goes_on(chat: Chat) -> None:
    """By button and by Escape; the rest is written in the middle of the same turn."""
    chat.served.script["Count"] = LONG
    chat.served.gate.hold(after=60)
    chat.send("Count")
    expect(chat.answer).to_contain_text("word0 word1")
    expect(chat.page.get_by_role("button", name="Stop")).to_be_visible()
    chat.picture("writing")
    chat.page.get_by_role("button", name="Stop").click()
    chat.served.gate.open()
    chat.finished()
    begun = chat.answer.inner_text()
    assert LONG.startswith(begun)
    assert len(begun) < len(LONG)
    expect(chat.messages.nth(1)).to_contain_text("Stopped.")
    expect(chat.messages.nth(1).locator(".stats")).to_contain_text("tokens")
    chat.served.gate.hold(after=40)
    chat.do(1, "Continue")
    expect(chat.page.locator("#thread .streaming")).to_have_count(1)
    expect(chat.answer).not_to_have_text(begun)
    chat.page.keyboard.press("Escape")
    chat.served.gate.open()
    expect(chat.messages.nth(1)).to_contain_text("Stopped.")
    chat.do(1, "Continue")
    chat.finished()
    expect(chat.answer).to_have_text(LONG)
    expect(chat.messages).to_have_count(2)
    expect(chat.messages.nth(1)).not_to_contain_text("Stopped.")


def test_regenerate_is_a_branch(chat: Chat) -> None:
    chat.ask("Hello")
    chat.served.script["Hello"] = "Another answer"
    chat.do(1, "Regenerate")
    chat.finished()
    expect(chat.answer).to_have_text("Another answer")
    expect(chat.messages).to_have_count(2)
    expect(chat.page.get_by_label("Version 2 of 2")).to_be_visible()
    chat.do(1, "Previous version")
    expect(chat.answer).to_have_text("You said: Hello")
    expect(chat.page.get_by_label("Version 1 of 2")).to_be_visible()
    expect(chat.page.get_by_role("button", name="Previous version")).to_be_disabled()
    chat.reload()
    expect(chat.answer).to_have_text("You said: Hello")
    chat.do(1, "Next version")
    expect(chat.answer).to_have_text("Another answer")


def test_editing_a_message_branches_and_nothing_is_lost(chat: Chat) -> None:
    chat.ask("First")
    chat.ask("Second")
    chat.do(0, "Edit")
    field = chat.page.get_by_label("Edit your message")
    expect(field).to_have_value("First")
    field.fill("First, changed")
    chat.picture("edit")
    field.press("Enter")
    chat.finished()
    expect(chat.messages).to_have_count(2)
    expect(chat.answer).to_have_text("You said: First, changed")
    assert chat.read == ["First, changed"]
    chat.do(0, "Previous version")
    expect(chat.messages).to_have_count(4)
    expect(chat.answer).to_have_text("You said: Second")
    chat.do(2, "Edit")
    chat.page.get_by_label("Edit your message").press("Escape")
    expect(chat.page.get_by_label("Edit your message")).to_have_count(0)
    expect(chat.messages).to_have_count(4)


def test_an_answer_is_edited_where_it_stands(chat: Chat) -> None:
    chat.ask("Hello")
    chat.do(1, "Edit answer")
    field = chat.page.get_by_label("Edit the answer")
    field.fill("Better words")
    chat.page.get_by_role("button", name="Save").click()
    expect(chat.answer).to_have_text("Better words")
    expect(chat.messages.nth(1)).to_contain_text("edited")
    chat.ask("And now?")
    assert chat.read == ["Hello", "Better words", "And now?"]


def test_delete_from_here_and_undo(chat: Chat) -> None:
    chat.ask("First")
    chat.ask("Second")
    chat.do(1, "Delete from here")
    expect(chat.messages).to_have_count(1)
    chat.page.get_by_role("button", name="Undo").click()
    expect(chat.messages).to_have_count(4)
    chat.reload()
    expect(chat.messages).to_have_count(4)
    chat.do(2, "Delete from here")
    expect(chat.messages).to_have_count(2)
    chat.reload()
    expect(chat.messages).to_have_count(2)


def test_copy(chat: Chat) -> None:
    chat.served.script["Bold"] = "This is **bold**"
    chat.ask("Bold", "This is bold")
    chat.do(1, "Copy")
    expect(chat.page.locator("#announcer")).to_have_text("Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "This is **bold**"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("the prompt has 9,999 tokens, and the window is 4,096"), "the window is 4,096"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("bug"), "the server failed; its log says why"),
    ],
    ids=["refused", "memory", "failed"],
)
def test_errors_stand_in_the_conversation(chat: Chat, error: Exception, told: str) -> None:
    chat.served.script["Hello"] = error
    chat.send("Hello")
    failure = chat.messages.nth(1).locator(".failure")
    expect(failure).to_contain_text(told)
    expect(chat.messages.nth(0)).to_contain_text("Hello")
    chat.picture("error")
    chat.reload()
    expect(failure).to_contain_text(told)
    del chat.served.script["Hello"]
    failure.get_by_role("button", name="Try again").click()
    chat.finished()
    expect(chat.answer).to_have_text("You said: Hello")
    expect(failure).to_have_count(0)
    expect(chat.messages).to_have_count(2)


def test_an_answer_that_fails_in_its_middle(chat: Chat) -> None:
    """What came stays, and the rest follows."""
    chat.served.script["Count"] = LONG
    chat.served.gate.hold(after=60)
    chat.send("Count")
    expect(chat.answer).to_contain_text("word0")
    chat.served.gate.fail = ArithmeticError("the logits are not numbers")
    chat.served.gate.open()
    expect(chat.messages.nth(1).locator(".failure")).to_contain_text("the logits are not numbers")
    expect(chat.answer).to_contain_text("word0")
    chat.page.get_by_role("button", name="Try again").click()
    chat.finished()
    expect(chat.answer).to_have_text(LONG)


def test_a_server_that_has_gone(chat: Chat) -> None:
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.send("Are you there?")
    expect(chat.page.locator(".failure")).to_contain_text("The server does not answer. Is qwen2 serve still running?")
    chat.page.unroute("**/v1/chat/completions")
    chat.page.get_by_role("button", name="Try again").click()
    chat.finished()
    expect(chat.answer).to_have_text("You said: Are you there?")


def test_hostile_answers_do_nothing(chat: Chat) -> None:
    chat.served.script["Attack"] = (
        "<img src=x onerror=\"document.title='taken'\"> <script>document.title='taken'</script> "
        "[link](javascript:document.title='taken') ![picture](https://example.com/seen.png)"
    )
    chat.send("Attack")
    chat.finished()
    expect(chat.answer).to_contain_text("onerror")
    expect(chat.answer.locator("img, script, [onerror], a[href^=javascript]")).to_have_count(0)
    assert "taken" not in chat.page.title()
    chat.send("<img src=x onerror=\"document.title='taken'\">")
    expect(chat.messages.nth(2)).to_contain_text("<img src=x")
    expect(chat.page.locator("#thread img")).to_have_count(0)


def test_the_answer_goes_on_beside_another_conversation(chat: Chat) -> None:
    chat.served.script["Count"] = LONG
    chat.served.gate.hold(after=60)
    chat.send("Count")
    expect(chat.answer).to_contain_text("word0")
    chat.page.get_by_role("button", name="New chat").click()
    expect(chat.messages).to_have_count(0)
    expect(chat.page.get_by_role("img", name="An answer is being written")).to_be_visible()
    chat.served.gate.open()
    expect(chat.page.get_by_role("img", name="An answer is being written")).to_have_count(0)
    chat.entries.first.click()
    expect(chat.answer).to_have_text(LONG)


def test_what_was_being_written_when_the_page_went_away(tab: Callable[..., Chat], served: Served) -> None:
    """It has stopped, and goes on when that is wanted."""
    chat = tab(served)
    served.script["Count"] = LONG
    served.gate.hold(after=60)
    chat.send("Count")
    expect(chat.answer).to_contain_text("word0")
    chat.page.reload()
    served.gate.open()
    expect(chat.messages).to_have_count(2)
    chat.messages.nth(1).hover()
    expect(chat.messages.nth(1)).to_contain_text("Stopped.")
    chat.do(1, "Continue")
    chat.finished()
    expect(chat.answer).to_have_text(LONG)
