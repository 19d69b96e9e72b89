"""For everybody: keyboard, screen reader, right-to-left text, phone, dark; files; and what a long conversation costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.page.conftest import NAME, PHONE, Chat, Served
from tests.page.test_chat import CODE, LONG
from tests.page.test_conversations import give, good

ARABIC = "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643"
WIDER = "() => [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.code, .table, .unseen, .sidebar, pre')).map(e => e.className || e.tagName)"


def test_everything_by_keyboard(chat: Chat) -> None:
    keyboard = chat.page.keyboard
    expect(chat.draft).to_be_focused()
    keyboard.type("First")
    keyboard.press("Shift+Enter")
    keyboard.type("second line")
    keyboard.press("Enter")
    chat.finished()
    expect(chat.messages.nth(0).locator(".bubble")).to_have_text("First\nsecond line")
    expect(chat.draft).to_be_focused()
    keyboard.press("ArrowUp")
    field = chat.page.get_by_label("Edit your message")
    expect(field).to_be_focused()
    expect(field).to_have_value("First\nsecond line")
    keyboard.press("Escape")
    expect(chat.messages.nth(0).get_by_role("button", name="Edit")).to_be_focused()
    keyboard.press("/")
    expect(chat.draft).to_be_focused()
    keyboard.press("Control+Shift+O")
    expect(chat.messages).to_have_count(0)
    keyboard.press("Control+k")
    expect(chat.page.get_by_label("Search titles and messages")).to_be_focused()
    keyboard.press("ArrowDown")
    expect(chat.entries.first).to_be_focused()
    keyboard.press("Enter")
    expect(chat.messages).to_have_count(2)
    keyboard.press("Control+m")
    expect(chat.dialog("Models")).to_be_visible()
    keyboard.press("Escape")
    expect(chat.dialog("Models")).to_be_hidden()
    chat.page.locator("#open-help").focus()
    keyboard.press("?")
    dialog = chat.dialog("Keyboard")
    expect(dialog).to_contain_text("New chat")
    chat.picture("help")
    for _ in range(4):
        keyboard.press("Tab")
        assert chat.page.evaluate("document.activeElement === document.body || document.activeElement.closest('#help') !== null")
    keyboard.press("Escape")
    expect(chat.page.locator("#open-help")).to_be_focused()


def test_a_menu_by_keyboard(chat: Chat) -> None:
    chat.ask("Hello")
    chat.page.get_by_role("button", name="More for Hello").focus()
    chat.page.keyboard.press("Enter")
    expect(chat.page.get_by_role("menuitem", name="Rename")).to_be_focused()
    chat.page.keyboard.press("ArrowDown")
    expect(chat.page.get_by_role("menuitem", name="Pin")).to_be_focused()
    chat.picture("menu")
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_role("menu")).to_have_count(0)
    expect(chat.page.get_by_role("button", name="More for Hello")).to_be_focused()


def test_enter_that_ends_a_composition_sends_nothing(chat: Chat) -> None:
    """As input methods for Chinese and Japanese end one."""
    chat.draft.fill("ni hao")
    sent = "(init) => document.getElementById('draft').dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', cancelable: true, bubbles: true, ...init }))"
    assert chat.page.evaluate(sent, {"isComposing": True})
    assert chat.page.evaluate(sent, {"keyCode": 229})
    expect(chat.messages).to_have_count(0)
    expect(chat.draft).to_have_value("ni hao")
    chat.draft.press("Enter")
    expect(chat.messages).to_have_count(2)


def test_every_control_has_a_name(chat: Chat) -> None:
    """And answers are announced once, at their end."""
    chat.served.script["Count"] = LONG
    chat.page.evaluate("""() => {
        window.said = []
        new MutationObserver(() => said.push(document.getElementById("announcer").textContent)).observe(
            document.getElementById("announcer"), { childList: true, characterData: true, subtree: true })
    }""")
    chat.ask("Count", "word199")
    assert chat.page.evaluate("said") == ["Answer finished"]
    nameless = chat.page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, a, dialog, progress")]
        .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length || e.getAttribute("aria-labelledby")
            || e.getAttribute("aria-hidden") === "true")).map((e) => e.outerHTML.slice(0, 90))""")
    assert nameless == []
    assert chat.page.locator("[aria-live] .prose, [aria-live] li").count() == 0


def test_right_to_left(chat: Chat) -> None:
    chat.served.script[ARABIC] = f"{ARABIC} **{ARABIC}**\n\n- {ARABIC}\n\n```python\nprint(1)\n```"
    chat.send(ARABIC)
    chat.finished()
    direction = "e => getComputedStyle(e).direction"
    assert chat.messages.nth(0).locator(".bubble").evaluate(direction) == "rtl"
    assert chat.answer.locator("p").evaluate(direction) == "rtl"
    assert chat.answer.locator("ul").evaluate(direction) == "rtl"
    assert chat.answer.locator("pre").evaluate(direction) == "ltr"
    chat.draft.fill(ARABIC)
    assert chat.draft.evaluate(direction) == "rtl"
    chat.picture("rtl")


def test_phone(tab: Callable[..., Chat], served: Served) -> None:
    """360 pixels: nothing scrolls sideways, the list is a drawer, dialogs fill the screen."""
    chat = tab(served, viewport=PHONE, has_touch=True, is_mobile=True)
    chat.picture("phone-empty")
    served.script["Merge intervals"] = CODE + "\n" + "unbreakable" * 20
    chat.send("Merge intervals " + "x" * 90)
    chat.finished()
    chat.page.get_by_role("button", name="New chat").click()
    chat.send("Merge intervals")
    chat.finished()
    chat.picture("phone")
    wide = "document.documentElement.scrollWidth > innerWidth || document.getElementById('scroller').scrollWidth > innerWidth"
    assert not chat.page.evaluate(wide)
    assert chat.page.evaluate(WIDER) == []
    expect(chat.page.locator("#sidebar")).to_be_hidden()
    chat.page.get_by_role("button", name="Conversations").click()
    expect(chat.page.locator("#sidebar")).to_be_in_viewport()
    chat.picture("phone-drawer")
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator("#sidebar")).to_be_hidden()
    chat.page.get_by_role("button", name="Conversations").click()
    chat.entries.last.click()
    expect(chat.page.locator("#sidebar")).to_be_hidden()
    for button, name in (("#open-settings", "settings"), ("#open-picker", "picker")):
        chat.page.locator(button).click()
        chat.picture(f"phone-{name}")
        assert chat.page.evaluate(WIDER) == []
        chat.page.keyboard.press("Escape")


def test_dark_by_system_and_by_switch(tab: Callable[..., Chat], served: Served) -> None:
    chat = tab(served, color_scheme="dark")
    light = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 128"
    assert not chat.page.evaluate(light)
    served.script["Merge intervals"] = CODE
    chat.send("Merge intervals")
    chat.finished()
    chat.picture("dark")
    switch = chat.page.locator("#theme")
    switch.click()
    assert chat.page.evaluate(light)
    chat.page.reload()
    assert chat.page.evaluate(light)
    switch.click()
    expect(switch).to_have_attribute("title", "Colours: dark")
    chat.page.emulate_media(color_scheme="light")
    assert not chat.page.evaluate(light)
    switch.click()
    assert chat.page.evaluate(light)


def test_contrast(tab: Callable[..., Chat], served: Served) -> None:
    """Every colour of text is read against what it stands on: 4.5 to 1, as WCAG's level AA has it."""
    pairs = [
        ("ink", "page"),
        ("soft", "page"),
        ("faint", "page"),
        ("faint", "side"),
        ("soft", "raised"),
        ("faint", "raised"),
        ("ink", "bubble"),
    ]
    pairs += [
        ("on-accent", "accent"),
        ("accent-ink", "page"),
        ("bad", "bad-soft"),
        ("warn", "page"),
        ("warn", "warn-soft"),
        ("good", "page"),
    ]
    pairs += [("good", "accent-soft"), ("soft", "accent-soft"), ("faint", "hover")]
    for scheme in ("light", "dark"):
        chat = tab(served, color_scheme=scheme)
        colours = chat.page.evaluate(
            "names => Object.fromEntries(names.map(name => [name, getComputedStyle(document.documentElement).getPropertyValue('--' + name)]))",
            sorted({name for pair in pairs for name in pair}),
        )
        for text, ground in pairs:
            first, second = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (first + 0.05) / (second + 0.05) >= 4.5, (scheme, text, ground)


def luminance(colour: str) -> float:
    parts = [int(colour.strip()[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_files_are_attached(chat: Chat) -> None:
    """The model reads them fenced and named; what is no text, or too much, is refused in words."""
    field = chat.page.locator("#attach-input")
    field.set_input_files({"name": "notes.md", "mimeType": "text/markdown", "buffer": b"# Notes\n```\ncode\n```\n"})
    expect(chat.page.locator(".chip")).to_have_text("notes.md21 B")
    toast = chat.page.locator("#toasts")
    field.set_input_files({"name": "photo.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x00\xff"})
    expect(toast).to_contain_text("photo.png is not a text file")
    field.set_input_files({"name": "big.txt", "mimeType": "text/plain", "buffer": b"a" * 600_000})
    expect(toast).to_contain_text("big.txt has 600 kB: files of up to 512 kB are read")
    chat.page.evaluate(
        """(text) => {
        const data = new DataTransfer()
        data.setData("text/plain", text)
        document.getElementById("draft").dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }))
    }""",
        "long " * 1400,
    )
    expect(chat.page.locator(".chip")).to_have_count(2)
    chat.page.get_by_role("button", name="Remove pasted-2.txt").click()
    chat.picture("files")
    chat.draft.fill("What is in it?")
    chat.draft.press("Enter")
    chat.finished()
    assert chat.read == ["notes.md:\n````\n# Notes\n```\ncode\n```\n````\n\nWhat is in it?"]
    chat.messages.nth(0).locator("summary").click()
    expect(chat.messages.nth(0).locator(".file pre")).to_contain_text("# Notes")
    expect(chat.page.locator(".chip")).to_have_count(0)


def test_files_are_dropped(chat: Chat) -> None:
    drop = """() => {
        const data = new DataTransfer()
        data.items.add(new File(["dropped text"], "dropped.txt", { type: "text/plain" }))
        for (const type of ["dragover", "drop"]) dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }))
    }"""
    chat.page.evaluate(drop)
    expect(chat.page.locator(".chip")).to_contain_text("dropped.txt")
    expect(chat.page.locator("#drop")).to_be_hidden()


def turns(number: int) -> str:
    """A file with a conversation of so many turns."""
    nodes: dict[str, Any] = {}
    for at in range(2 * number):
        content = CODE if at % 2 else f"Question {at // 2}"
        node = {"id": f"n{at}", "parent": f"n{at - 1}" if at else None, "role": "assistant" if at % 2 else "user", "content": content}
        nodes[f"n{at}"] = node | {"files": [], "created": at, "changed": at, "model": "tiny:one", "status": "done"}
    return json.dumps(good(title="Long", nodes=nodes, chosen={}, model=NAME))


def test_a_token_costs_the_same_in_a_long_conversation(chat: Chat) -> None:
    """While the 101st answer comes, nothing outside it changes; the stylesheet lets the browser skip what is not seen."""
    chat.page.get_by_role("button", name="Export and import").click()
    give(chat, turns(100))
    chat.page.keyboard.press("Escape")
    expect(chat.messages).to_have_count(200)
    chat.picture("long")
    chat.served.script["Question 100"] = LONG
    chat.served.llm.forgetful = True
    chat.page.locator("#draft").fill("Question 100")
    chat.served.gate.hold(after=5)
    chat.draft.press("Enter")
    expect(chat.messages).to_have_count(202)
    chat.page.evaluate("""() => {
        window.outside = []
        window.inside = 0
        new MutationObserver((all) => all.forEach((one) => {
            const element = one.target.nodeType === 1 ? one.target : one.target.parentElement
            if (element?.closest("#thread > li:last-child")) inside += 1
            else outside.push(`${one.type} ${one.attributeName ?? ""} ${element?.id || element?.className}`)
        })).observe(document.getElementById("scroller"), { subtree: true, childList: true, attributes: true, characterData: true })
    }""")
    chat.served.gate.open()
    chat.finished()
    expect(chat.answer).to_contain_text("word199")
    assert chat.page.evaluate("inside") > 5
    assert chat.page.evaluate("outside") == []
    skipped = "[...document.querySelectorAll('#thread > li')].filter(e => getComputedStyle(e).contentVisibility === 'auto').length"
    assert chat.page.evaluate(skipped) == 201


@pytest.mark.parametrize("up", [False, True], ids=["follows", "stays"])
def test_the_view_follows_the_end_unless_the_reader_went_up(chat: Chat, up: bool) -> None:
    chat.served.script["Count"] = "\n\n".join(LONG.split())[:1200]
    chat.served.gate.hold(after=500)
    chat.send("Count")
    expect(chat.answer.locator("p").nth(40)).to_be_attached()
    to_end = chat.page.get_by_role("button", name="Jump to the end")
    distance = "() => { const s = document.getElementById('scroller'); return s.scrollHeight - s.clientHeight - s.scrollTop }"
    if up:
        chat.page.locator("#scroller").hover()
        chat.page.mouse.wheel(0, -400)
        expect(to_end).to_be_visible()
        chat.picture("scrolled-up")
    chat.served.gate.open()
    chat.finished()
    if up:
        assert chat.page.evaluate(distance) > 300
        to_end.click()
    expect(to_end).to_be_hidden()
    assert chat.page.evaluate(distance) < 3
