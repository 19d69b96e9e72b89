"""Models: chosen, downloaded, described; the meter; the key."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.resources import files

import httpx
from playwright.sync_api import expect

from qwen2.weights.registry import ENTRIES
from tests.page.conftest import Chat, Served

KNOWN = json.loads((files("qwen2.server") / "web" / "models.json").read_text())


def named(model: str) -> re.Pattern[str]:
    """The button that chooses a model, whose name begins with the model's; others begin with what they do."""
    return re.compile(f"^{model}")


def test_the_list_of_known_models_is_true() -> None:
    for model in KNOWN:
        entry = ENTRIES[model["name"]]
        size = None if entry.known is None else entry.known.size
        assert (model["format"], model["licence"], model.get("size")) == (entry.format, entry.licence, size), model["name"]


def test_choose_a_model(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    chat = tab(serve(models=("tiny:one", "tiny:two")))
    chat.ask("Hello")
    chat.page.get_by_role("button", name="Model: tiny:one. Change it").click()
    dialog = chat.dialog("Models")
    expect(dialog.get_by_role("button", name=named("tiny:one"))).to_have_attribute("aria-pressed", "true")
    expect(dialog.get_by_role("button", name=named("tiny:one"))).to_contain_text("4,096 tokens of context")
    expect(dialog.get_by_role("button", name=named("tiny:one"))).to_contain_text("in memory")
    expect(dialog.get_by_role("button", name=named("tiny:two"))).not_to_contain_text("in memory")
    chat.picture("picker")
    dialog.get_by_label("Find or name a model").fill("two")
    expect(dialog.get_by_role("button", name=named("tiny:one"))).to_have_count(0)
    dialog.get_by_role("button", name=named("tiny:two")).click()
    expect(dialog).to_be_hidden()
    chat.ask("Hello again")
    expect(chat.messages.nth(3).locator("h2")).to_have_text("tiny:two")
    chat.page.get_by_role("button", name="New chat").click()
    expect(chat.page.locator("#model-name")).to_have_text("tiny:two")


def test_a_model_is_unloaded_and_deleted(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    served = serve(models=("tiny:one", "tiny:two"))
    chat = tab(served)
    chat.ask("Hello")
    chat.page.locator("#open-picker").click()
    dialog = chat.dialog("Models")
    expect(dialog.get_by_role("button", name="Unload tiny:two")).to_have_count(0)
    dialog.get_by_role("button", name="Unload tiny:one").click()
    expect(dialog.get_by_role("button", name="Unload tiny:one")).to_have_count(0)
    expect(dialog.get_by_role("button", name=named("tiny:one"))).not_to_contain_text("in memory")
    assert httpx.get(f"{served.url}/api/ps").json() == {"models": []}
    expect(dialog.get_by_label("Find or name a model")).to_be_focused()
    dialog.get_by_role("button", name="Delete tiny:one").click()
    asked = chat.page.get_by_role("alertdialog", name="Delete tiny:one?")
    expect(asked).to_contain_text("on the server's disk, for everybody who uses it")
    expect(asked.get_by_role("button", name="Cancel")).to_be_focused()
    chat.picture("delete")
    chat.page.keyboard.press("Enter")
    expect(asked).to_be_hidden()
    assert served.store.has("tiny:one"), "Enter is no yes"
    dialog.get_by_role("button", name="Delete tiny:one").click()
    asked.get_by_role("button", name="Delete").click()
    expect(dialog.get_by_role("button", name=named("tiny:one"))).to_have_count(0)
    assert [model.name for model in served.store.list()] == ["tiny:two"]
    dialog.get_by_role("button", name=named("tiny:two")).click()
    chat.ask("Hello again")
    expect(chat.messages.nth(3).locator("h2")).to_have_text("tiny:two")


def test_a_model_that_answers_is_not_deleted(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    served = serve()
    chat = tab(served)
    served.gate.hold(after=3)
    chat.send("Hello")
    expect(chat.page.locator("#thread .streaming")).to_have_count(1)
    chat.page.locator("#open-picker").click()
    dialog = chat.dialog("Models")
    dialog.get_by_role("button", name="Delete tiny:one").click()
    chat.page.get_by_role("alertdialog").get_by_role("button", name="Delete").click()
    expect(chat.page.locator("#toasts")).to_contain_text("tiny:one is answering somebody")
    dialog.get_by_role("button", name="Unload tiny:one").click()
    expect(chat.page.locator("#toasts")).to_contain_text("tiny:one goes when its answers have ended")
    served.gate.open()
    chat.page.keyboard.press("Escape")
    chat.finished()
    expect(chat.answer).to_have_text("You said: Hello")
    assert served.store.has("tiny:one")


def test_which_model_a_page_begins_with(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    """The one chosen last in this browser, else one in memory, else the first."""
    served = serve(models=("tiny:one", "tiny:three", "tiny:two"))
    expect(tab(served).page.locator("#model-name")).to_have_text("tiny:one")
    httpx.post(f"{served.url}/api/generate", json={"model": "tiny:two", "keep_alive": -1, "stream": False}).raise_for_status()
    chat = tab(served)
    expect(chat.page.locator("#model-name")).to_have_text("tiny:two")
    chat.page.locator("#open-picker").click()
    chat.dialog("Models").get_by_role("button", name=named("tiny:three")).click()
    expect(tab(served, chat.page.context).page.locator("#model-name")).to_have_text("tiny:three")
    served.store.remove("tiny:three")
    expect(tab(served, chat.page.context).page.locator("#model-name")).to_have_text("tiny:two")


def test_the_first_model_is_downloaded(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    """With progress; then it is the one that answers."""
    served = serve(models=())
    chat = tab(served, ready=False)
    name = KNOWN[0]["name"]
    chat.page.get_by_role("button", name="Download one").click()
    dialog = chat.dialog("Models")
    served.store.gate.hold(after=4)
    dialog.get_by_role("button", name=f"Download {name}").click()
    expect(dialog.locator(".pulling")).to_contain_text("30 MB of 100 MB")
    expect(dialog.get_by_role("progressbar")).to_have_attribute("value", "30000000")
    chat.picture("download")
    served.store.gate.open()
    expect(dialog.get_by_role("button", name=f"Download {name}")).to_have_count(0)
    expect(dialog.get_by_role("button", name=name).first).to_contain_text("tokens of context")  # its row is written for the last time
    dialog.get_by_role("button", name=name).first.click()
    expect(dialog).to_be_hidden()
    expect(chat.page.locator("#model-name")).to_have_text(name)
    chat.ask("Hello")


def test_a_download_is_cancelled_or_fails(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    served = serve()
    chat = tab(served)
    chat.page.locator("#open-picker").click()
    dialog = chat.dialog("Models")
    served.store.gate.hold(after=3)
    dialog.get_by_label("Find or name a model").fill("smollm2:135m")
    dialog.get_by_role("button", name="Download smollm2:135m").click()
    expect(dialog.locator(".pulling")).to_contain_text("20 %")
    dialog.get_by_role("button", name="Cancel smollm2:135m").click()
    expect(dialog.locator(".pulling")).to_have_count(0)
    served.store.refused = "no source has it: huggingface.co cannot be reached"
    served.store.gate.open()
    dialog.get_by_role("button", name="Download smollm2:135m").click()
    expect(dialog.get_by_role("alert")).to_have_text("no source has it: huggingface.co cannot be reached")
    served.store.refused = None
    dialog.get_by_role("button", name="Download smollm2:135m").click()
    expect(dialog.get_by_role("button", name="Download smollm2:135m")).to_have_count(0)
    expect(dialog.get_by_role("button", name=named("smollm2:135m"))).to_contain_text("4,096 tokens of context")


def test_a_download_begun_anew_is_not_taken_for_the_one_that_was_cancelled(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    served = serve()
    served.store.gate.hold()
    begun = """async () => {
      const { Models } = await import("/web/app/models.js");
      const models = new Models();
      const first = models.pull("smollm2:135m");
      models.cancel("smollm2:135m");
      models.pull("smollm2:135m");
      return [await first, models.pulls.has("smollm2:135m")];
    }"""
    assert tab(served).page.evaluate(begun) == [False, True]


def test_a_model_that_has_gone(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    served = serve(models=("tiny:one", "tiny:two"))
    chat = tab(served)
    served.store.remove("tiny:one")
    chat.send("Hello")
    expect(chat.page.locator(".failure")).to_contain_text("'tiny:one' is not here")
    chat.page.locator(".failure").get_by_role("button", name="Choose a model").click()
    chat.dialog("Models").get_by_role("button", name=named("tiny:two")).click()
    chat.do(1, "Regenerate")
    chat.finished()
    expect(chat.answer).to_have_text("You said: Hello")


def test_the_meter_counts_what_the_server_counts(chat: Chat) -> None:
    """And warns before the window is full."""
    chat.ask("Hello")
    request = chat.served.llm.asked[-1].request
    used = len(request.prompt) + len(chat.served.llm.tokenizer.encode("You said: Hello"))
    meter = chat.page.locator("#meter")
    expect(meter).to_contain_text(" / 4,096 tokens")
    shown = meter.inner_text()
    assert used <= int(shown.partition(" ")[0].replace(",", "")) <= used + 40  # the ends of turns, the answer's opening
    chat.draft.fill("x y " * 900)
    expect(chat.page.locator("#warning")).to_contain_text("more tokens")
    chat.picture("meter")
    chat.draft.fill("x y " * 1100)
    expect(chat.page.locator("#warning")).to_contain_text("the model reads 4,096")
    count = int(meter.inner_text().partition(" ")[0].replace(",", ""))
    chat.draft.press("Enter")
    expect(chat.page.locator(".failure")).to_contain_text(f"{count:,} tokens")


def test_the_key_is_asked_for(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    served = serve(api_key="open sesame")
    chat = tab(served, ready=False)
    dialog = chat.dialog("This server wants a key")
    expect(dialog.get_by_label("Key")).to_be_focused()
    dialog.get_by_label("Key").fill("wrong")
    dialog.get_by_role("button", name="Go on").click()
    expect(dialog).to_contain_text("That is not this server's key.")
    chat.picture("key")
    dialog.get_by_label("Key").fill("open sesame")
    dialog.get_by_label("Key").press("Enter")
    expect(dialog).to_be_hidden()
    expect(chat.page.locator("#model-name")).to_have_text("tiny:one")
    chat.ask("Hello")
    assert chat.page.evaluate("sessionStorage.getItem('api-key')") == "open sesame"
    assert chat.page.evaluate("JSON.stringify(localStorage)").find("sesame") < 0
    chat.reload()
    expect(chat.answer).to_have_text("You said: Hello")
    expect(dialog).to_be_hidden()


def test_no_key_is_given(tab: Callable[..., Chat], serve: Callable[..., Served]) -> None:
    chat = tab(serve(api_key="open sesame"), ready=False)
    chat.dialog("This server wants a key").get_by_role("button", name="Cancel").click()
    expect(chat.page.locator("#banner")).to_contain_text("this server wants its key")
