"""Conversations as they are kept: found again, searched, renamed, exported, and open in two tabs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tests.page.conftest import NAME, Chat, Served


def menu(chat: Chat, title: str, action: str) -> None:
    chat.page.locator("#list").get_by_text(title, exact=True).hover()
    chat.page.get_by_role("button", name=f"More for {title}").click()
    chat.page.get_by_role("menuitem", name=action).click()


def new_chat(chat: Chat) -> None:
    chat.page.get_by_role("button", name="New chat").click()
    expect(chat.messages).to_have_count(0)


def test_reload_and_find_it_again(chat: Chat) -> None:
    chat.ask("Remember me")
    new_chat(chat)
    chat.ask("Something else")
    chat.draft.fill("half a thought")
    chat.page.locator("#list").get_by_text("Remember me").click()
    expect(chat.answer).to_have_text("You said: Remember me")
    expect(chat.draft).to_have_value("")
    chat.reload()
    expect(chat.answer).to_have_text("You said: Remember me")
    expect(chat.entries).to_have_text(["Something else", "Remember me"])
    chat.page.go_back()
    expect(chat.answer).to_have_text("You said: Something else")
    expect(chat.draft).to_have_value("half a thought")


def test_search_in_titles_and_texts(chat: Chat) -> None:
    chat.served.script["Birds"] = "The wren is small and loud.\n\nIt nests in ivy."
    chat.ask("Birds", "The wren")
    new_chat(chat)
    chat.ask("Fish")
    field = chat.page.get_by_role("searchbox", name="Search titles and messages")
    field.fill("NESTS in")
    expect(chat.entries).to_have_count(1)
    expect(chat.entries.first).to_contain_text("It nests in ivy")
    chat.picture("search")
    field.fill("fish")
    expect(chat.entries).to_have_text(["Fish"])
    field.fill("elephant")
    expect(chat.page.locator("#list")).to_have_text("Nothing has these words.")
    field.press("Escape")
    expect(chat.entries).to_have_count(2)


def test_rename_pin_delete_and_undo(chat: Chat) -> None:
    for name in ("Old", "New"):
        chat.ask(name)
        new_chat(chat)
    menu(chat, "Old", "Pin")
    expect(chat.page.locator("#list h2")).to_have_text(["Pinned", "Today"])
    expect(chat.entries).to_have_text(["Old", "New"])
    menu(chat, "Old", "Rename")
    chat.dialog("Rename").get_by_label("Title").fill("Oldest")
    chat.dialog("Rename").get_by_role("button", name="Rename").click()
    expect(chat.entries).to_have_text(["Oldest", "New"])
    menu(chat, "New", "Delete")
    expect(chat.entries).to_have_text(["Oldest"])
    chat.page.get_by_role("button", name="Undo").click()
    expect(chat.entries).to_have_text(["Oldest", "New"])
    expect(chat.answer).to_have_text("You said: New")
    menu(chat, "New", "Delete")
    expect(chat.entries).to_have_text(["Oldest"])
    chat.reload()
    expect(chat.entries).to_have_text(["Oldest"])
    expect(chat.messages).to_have_count(0)


def exported(chat: Chat, button: str) -> Path:
    chat.kept()
    if not chat.dialog("Export and import").is_visible():
        chat.page.get_by_role("button", name="Export and import").click()
    with chat.page.expect_download() as found:
        chat.dialog("Export and import").get_by_role("button", name=button).click()
    return Path(found.value.path())


def give(chat: Chat, content: str) -> None:
    chat.page.locator("#import-input").set_input_files({"name": "some.json", "mimeType": "application/json", "buffer": content.encode()})


def test_export_and_import(tab: Callable[..., Chat], served: Served) -> None:
    """What one browser gives another takes, branches and settings included; twice is two conversations."""
    first = tab(served)
    first.ask("Hello")
    served.script["Hello"] = "Again"
    first.do(1, "Regenerate")
    first.finished()
    one = json.loads(exported(first, "Export this conversation as JSON").read_text())
    assert one["version"] == 1
    first.picture("export")
    first.dialog("Export and import").get_by_role("button", name="Close").click()
    new_chat(first)
    first.ask("Second")
    everything = exported(first, "Export all as JSON").read_text()
    second = tab(served)
    second.page.get_by_role("button", name="Export and import").click()
    give(second, everything)
    expect(second.page.locator("#data-note")).to_have_text("2 conversations imported")
    give(second, everything)
    expect(second.entries).to_have_count(4)
    second.dialog("Export and import").get_by_role("button", name="Close").click()
    second.entries.get_by_text("Hello").first.click()
    expect(second.answer).to_have_text("Again")
    second.do(1, "Previous version")
    expect(second.answer).to_have_text("You said: Hello")
    ids = {conversation["id"] for conversation in json.loads(exported(second, "Export all as JSON").read_text())["conversations"]}
    assert len(ids) == 4


def test_export_as_markdown(chat: Chat) -> None:
    chat.served.script["Show"] = "Some **bold** text"
    chat.ask("Show", "Some bold text")
    text = exported(chat, "Export this conversation as Markdown").read_text()
    assert text == "# Show\n\n## You\n\nShow\n\n## tiny:one\n\nSome **bold** text\n"


def good(**changes: Any) -> dict[str, Any]:
    """A file with one conversation of one message."""
    node = {"id": "a", "parent": None, "role": "user", "content": "Hi", "files": [], "created": 1, "changed": 1}
    conversation: dict[str, Any] = {"id": "x", "title": "Hi", "named": False, "pinned": False, "created": 1, "changed": 1, "model": None}
    conversation |= {"system": "", "sampling": {}, "nodes": {"a": node}, "chosen": {"": "a"}, "gone": {}}
    return {"format": "qwen2-conversations", "version": 1, "exported": "", "conversations": [{**conversation, **changes}]}


RING = {
    name: {"id": name, "parent": other, "role": "user", "content": "", "files": [], "created": 1, "changed": 1}
    for name, other in (("a", "b"), ("b", "a"))
}
BAD = {
    "json": ("{", "The file is not JSON."),
    "other": ("[1]", "The file holds no conversations that were exported here."),
    "version": (json.dumps(good() | {"version": 9}), "The file has version 9; this page reads version 1."),
    "title": (json.dumps(good(title=3)), "Conversation 1 has no proper title."),
    "orphan": (
        json.dumps(good(nodes={"a": good()["conversations"][0]["nodes"]["a"] | {"parent": "z"}})),
        "Conversation 1, message a has no proper message that it follows.",
    ),
    "ring": (json.dumps(good(nodes=RING)), "Conversation 1: its messages follow each other in a ring."),
    "sampling": (json.dumps(good(sampling={"top_p": 7})), "Conversation 1: top_p is 7: from 0.01 to 1."),
    "stop": (json.dumps(good(sampling={"stop": ["a", ""]})), 'Conversation 1: stop is ["a",""]: a list of texts.'),
    "unknown": (json.dumps(good(sampling={"tempo": 1})), "Conversation 1: tempo is no sampling setting."),
}


def test_bad_files_are_told_in_one_line(chat: Chat) -> None:
    chat.page.get_by_role("button", name="Export and import").click()
    for content, told in BAD.values():
        give(chat, content)
        expect(chat.page.locator("#data-note")).to_have_text(told)
    give(chat, json.dumps(good()))
    expect(chat.page.locator("#data-note")).to_have_text("1 conversation imported")
    expect(chat.entries).to_have_text(["Hi"])


@pytest.mark.parametrize("seen", [False, True], ids=["at once", "seen"])
def test_two_tabs_lose_nothing(tab: Callable[..., Chat], served: Served, seen: bool) -> None:
    """Both write into one conversation: each has the other's messages, as branches of their own, whether or not the second has
    seen the first's question when it asks: an answer that is being written is followed by nothing."""
    first = tab(served)
    first.ask("Begin")
    second = tab(served, first.page.context, path=f"/{first.page.url.rpartition('/')[2]}")
    expect(second.answer).to_have_text("You said: Begin")
    second.ask("From the second")
    expect(first.answer).to_have_text("You said: From the second")
    served.gate.hold()
    first.send("Both at once, first")
    if seen:
        expect(second.messages).to_have_count(6)
        expect(second.messages.nth(4)).to_contain_text("Both at once, first")
    second.send("Both at once, second")
    expect(second.messages.nth(4)).to_contain_text("Both at once, second")
    expect(second.messages).to_have_count(6)
    served.gate.open()
    for chat in (first, second):
        chat.finished()
        expect(chat.messages).to_have_count(6)
        chat.kept(chosen=False)
    first.page.reload()
    expect(first.page.get_by_label(re.compile(r"Version \d of 2"))).to_be_visible()
    stored = json.loads(exported(first, "Export all as JSON").read_text())["conversations"][0]
    answers = sorted(node["content"] for node in stored["nodes"].values() if node["role"] == "assistant")
    said = ["Begin", "Both at once, first", "Both at once, second", "From the second"]
    assert answers == [f"You said: {text}" for text in said]


def test_another_tab_deletes_the_conversation(tab: Callable[..., Chat], served: Served) -> None:
    first = tab(served)
    first.ask("Hello")
    second = tab(served, first.page.context)
    menu(second, "Hello", "Delete")
    expect(first.messages).to_have_count(0)
    expect(first.entries).to_have_count(0)


def test_without_storage_the_chat_goes_on(tab: Callable[..., Chat], served: Served) -> None:
    """And the page says that it keeps nothing."""
    chat = tab(served, ready=False)
    chat.page.add_init_script("delete globalThis.indexedDB; delete Window.prototype.indexedDB")
    chat.page.add_init_script("Object.defineProperty(globalThis, 'indexedDB', { value: { open() { throw new Error('switched off') } } })")
    chat.open()
    expect(chat.page.get_by_role("alert")).to_have_text(
        "Conversations end with this page: switched off. Allow this page to store data to keep them."
    )
    chat.ask("Hello")
    expect(chat.page.locator("#list")).to_have_text("Conversations are not kept in this browser.")


@pytest.mark.parametrize("system", ["", "Speak like a captain."])
def test_settings_belong_to_the_conversation(chat: Chat, system: str) -> None:
    chat.page.get_by_role("button", name="Settings of this conversation").click()
    dialog = chat.dialog("This conversation")
    expect(dialog.get_by_label("Temperature")).to_have_attribute("placeholder", "0")
    expect(dialog.get_by_label("Min p")).to_have_attribute("placeholder", "off")
    dialog.get_by_label("System prompt").fill(system)
    dialog.get_by_label("Temperature").fill("0.3")
    dialog.get_by_label("Top k").fill("7")
    dialog.get_by_label("Seed").fill("11")
    dialog.get_by_label("Most tokens").fill("5")
    dialog.get_by_label("Top p").fill("2")
    dialog.get_by_role("button", name="Done").click()
    expect(dialog.get_by_label("Top p")).to_be_focused()
    expect(dialog).to_contain_text("From 0.01 to 1")
    chat.picture("settings")
    dialog.get_by_label("Top p").fill("")
    dialog.get_by_role("button", name="Done").click()
    expect(dialog).to_be_hidden()
    chat.send("Hello there")
    expect(chat.messages.nth(1)).to_contain_text("Ended at its limit of tokens.")
    request = chat.served.llm.asked[-1].request
    assert (request.params.temperature, request.params.top_k, request.params.seed, request.params.max_tokens) == (0.3, 7, 11, 5)
    spoken = chat.served.llm.turns(request.prompt)[0]
    assert spoken == ("system", system or "You are a helpful assistant.")
    new_chat(chat)
    chat.ask("Plain")
    assert chat.served.llm.asked[-1].request.params.max_tokens != 5


def test_settings_show_the_models_own_values(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    """Also those that Ollama, whose names /api/show has, calls otherwise."""
    served = serve()
    own = {"repeat_penalty": 1.1, "presence_penalty": 0.25, "top_p": 0.00005, "num_predict": 40}
    httpx.post(f"{served.url}/api/create", json={"model": "tiny:own", "from": NAME, "parameters": own, "stream": False}).raise_for_status()
    chat = tab(served)
    chat.page.locator("#open-picker").click()
    chat.dialog("Models").get_by_role("button", name=re.compile("^tiny:own")).click()
    chat.page.get_by_role("button", name="Settings of this conversation").click()
    dialog = chat.dialog("This conversation")
    for label, value in {"Repetition penalty": "1.1", "Presence penalty": "0.25", "Top p": "0.00005", "Most tokens": "40"}.items():
        expect(dialog.get_by_label(label)).to_have_attribute("placeholder", value)


def test_penalties_and_texts_that_end_an_answer(chat: Chat) -> None:
    chat.served.script["Count"] = 'One, two \\ "three"\nfour, five'
    chat.page.get_by_role("button", name="Settings of this conversation").click()
    dialog = chat.dialog("This conversation")
    dialog.get_by_label("Presence penalty").fill("0.5")
    dialog.get_by_label("Frequency penalty").fill("-2.5")
    dialog.get_by_label("Stop at").fill("\\nfour\n\nnever \\\\ said\n")
    dialog.get_by_role("button", name="Done").click()
    expect(dialog).to_contain_text("From -2 to 2")
    dialog.get_by_label("Frequency penalty").fill("-1")
    dialog.get_by_role("button", name="Done").click()
    expect(dialog).to_be_hidden()
    chat.ask("Count", "three")
    expect(chat.answer).not_to_contain_text("four")
    params = chat.served.llm.asked[-1].request.params
    assert (params.presence_penalty, params.frequency_penalty, params.stop[:2]) == (0.5, -1, ("\nfour", "never \\ said"))
    chat.reload()
    chat.page.get_by_role("button", name="Settings of this conversation").click()
    expect(dialog.get_by_label("Stop at")).to_have_value("\\nfour\nnever \\\\ said")
    chat.picture("stops")
    dialog.get_by_label("Stop at").fill("\n".join("x" * 17))
    dialog.get_by_role("button", name="Done").click()
    expect(dialog).to_contain_text("At most 16 of them")


def test_what_the_model_says_of_itself_is_shown_and_stepped_from(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    """Its own values stand in empty fields, Ollama's names or not; an arrow goes on from them, or from where the setting is off."""
    served = serve()
    own = {"repeat_penalty": 1.1, "num_predict": 40, "presence_penalty": 0.00001}
    told = httpx.post(f"{served.url}/api/create", json={"model": "mine:one", "from": "tiny:one", "parameters": own, "stream": False})
    assert told.status_code == 200, told.text
    chat = tab(served)
    chat.page.locator("#open-picker").click()
    chat.dialog("Models").get_by_role("button", name=re.compile("^mine:one")).first.click()
    chat.page.get_by_role("button", name="Settings of this conversation").click()
    dialog = chat.dialog("This conversation")
    for label, shown in {"Repetition penalty": "1.1", "Most tokens": "40", "Presence penalty": "0.00001", "Top p": "1"}.items():
        expect(dialog.get_by_label(label)).to_have_attribute("placeholder", shown)
    steps = {"Repetition penalty": "1.15", "Most tokens": "41", "Frequency penalty": "0.1", "Top k": "1"}
    for label, value in steps.items():
        dialog.get_by_label(label).press("ArrowUp")
        expect(dialog.get_by_label(label)).to_have_value(value)
    dialog.get_by_label("Temperature").fill("0,7")
    dialog.get_by_label("Temperature").press("ArrowDown")
    expect(dialog.get_by_label("Temperature")).to_have_value("0.6")
    dialog.get_by_label("Most tokens").fill("1,000")
    dialog.get_by_role("button", name="Done").click()
    expect(dialog).to_contain_text("A number, or empty")
    chat.page.keyboard.press("Escape")
    anew = {"model": "mine:one", "from": "tiny:one", "parameters": {"repeat_penalty": 1.3}, "stream": False}
    assert httpx.post(f"{served.url}/api/create", json=anew).status_code == 200
    chat.page.locator("#open-picker").click()
    chat.dialog("Models").get_by_role("button", name=re.compile("^mine:one")).first.click()
    chat.page.get_by_role("button", name="Settings of this conversation").click()
    expect(dialog.get_by_label("Repetition penalty")).to_have_attribute("placeholder", "1.3")


def test_settings_for_new_chats(chat: Chat) -> None:
    chat.page.get_by_role("button", name="Settings of this conversation").click()
    dialog = chat.dialog("This conversation")
    dialog.get_by_label("Temperature").press("ArrowUp")
    dialog.get_by_label("System prompt").fill("Be brief.")
    dialog.get_by_role("button", name="Use for new chats").click()
    expect(dialog).to_be_hidden()
    new_chat(chat)
    chat.ask("Hello")
    request = chat.served.llm.asked[-1].request
    assert request.params.temperature == 0.1
    assert chat.served.llm.turns(request.prompt)[0] == ("system", "Be brief.")
