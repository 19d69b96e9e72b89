/** The list of conversations: pinned ones, then by time; search over titles and texts; what can be done with each. */

import { askForTitle } from "./dialogs.js";
import { $, debounced, el, iconButton } from "./dom.js";
import { period } from "./format.js";
import { openMenu } from "./menu.js";
import { toast } from "./notify.js";

export class List {
  /** `exportOne(id)`: see data.js. */
  constructor(chat, exportOne) {
    this.chat = chat;
    this.exportOne = exportOne;
    this.found = null; // id to a few words, while something is searched for
    this.searching = new AbortController();
    this.soon = debounced(() => this.refresh(), 60);
    chat.addEventListener("list", () => this.soon());
    chat.addEventListener("open", () => this.soon());
    const search = debounced(() => this.search(), 180);
    $("search").addEventListener("input", search);
    $("search").addEventListener("keydown", (event) => this.#searchKey(event));
    this.refresh();
  }

  #searchKey(event) {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      $("list").querySelector(".entry-open")?.focus();
    } else if (event.key === "Escape" && event.target.value !== "") {
      event.target.value = "";
      event.stopPropagation();
      this.search();
    }
  }

  async search() {
    this.searching.abort();
    this.searching = new AbortController();
    const { signal } = this.searching;
    const text = $("search").value;
    const found = text.trim() === "" || this.chat.storage === null ? null : await this.chat.storage.search(text, signal);
    if (signal.aborted) return;
    this.found = found;
    await this.refresh();
  }

  async refresh() {
    if (this.chat.storage === null) {
      this.shownAs = null;
      $("list").replaceChildren(el("p", {}, "Conversations are not kept in this browser."));
      return;
    }
    const all = (await this.chat.storage.summaries()).sort((a, b) => b.changed - a.changed);
    const shown = this.found === null ? all : all.filter((one) => this.found.has(one.id));
    for (const { id } of all) this.chat.known.add(id);
    const groups = new Map();
    for (const one of shown) {
      const name = this.found !== null ? "Found" : one.pinned ? "Pinned" : period(one.changed);
      groups.set(name, [...(groups.get(name) ?? []), one]);
    }
    const pinned = groups.get("Pinned");
    groups.delete("Pinned");
    const ordered = pinned ? [["Pinned", pinned], ...groups] : [...groups];
    const { id: current } = this.chat.conversation;
    const state = JSON.stringify([
      ordered.map(([name, entries]) => [name, entries.map(({ id, title }) => [id, title])]),
      current,
      [...this.chat.runs.keys()],
      [...(this.found ?? [])],
    ]);
    if (state === this.shownAs) return; // nothing that is seen has changed
    this.shownAs = state;
    const focused = document.activeElement?.closest?.(".entry")?.dataset.id;
    const part = document.activeElement?.className;
    $("list").replaceChildren(...ordered.flatMap(([name, entries]) => this.#group(name, entries)));
    if (shown.length === 0)
      $("list").append(el("p", {}, this.found === null ? "Conversations will stand here." : "Nothing has these words."));
    if (focused)
      $("list")
        .querySelector(`[data-id="${focused}"] .${part?.split(" ")[0]}`)
        ?.focus();
  }

  #group(name, entries) {
    const heading = el("h2", {}, name);
    return [heading, el("ul", { "aria-label": name }, ...entries.map((one) => this.#entry(one)))];
  }

  #entry(one) {
    const current = one.id === this.chat.conversation.id;
    const title = one.title || "Untitled";
    const words = this.found?.get(one.id);
    const open = el(
      "a",
      { class: "entry-open", href: `#${one.id}`, "aria-current": current ? "page" : null, title },
      el("span", { class: "entry-title", dir: "auto" }, title),
      words ? el("span", { class: "entry-found", dir: "auto" }, words) : null,
    );
    const more = iconButton("dots", `More for ${title}`, () => this.#menu(more, one), {
      "aria-haspopup": "menu",
      "aria-expanded": "false",
    });
    const busy = this.chat.runs.has(one.id) ? el("span", { class: "busy", role: "img", "aria-label": "An answer is being written" }) : null;
    return el("li", { class: `entry${current ? " current" : ""}`, "data-id": one.id }, open, busy, more);
  }

  #menu(button, { id, title, pinned }) {
    const { chat } = this;
    openMenu(button, [
      { icon: "pen", label: "Rename", run: () => this.#rename(id, title) },
      { icon: "pin", label: pinned ? "Unpin" : "Pin", run: () => chat.change(id, { pinned: !pinned }) },
      { icon: "out", label: "Export", run: () => this.exportOne(id) },
      { icon: "bin", label: "Delete", bad: true, run: () => this.#delete(id) },
    ]);
  }

  async #rename(id, title) {
    const given = await askForTitle(title);
    if (given !== null) await this.chat.change(id, { title: given, named: true });
  }

  async #delete(id) {
    const undo = await this.chat.delete(id);
    toast("Conversation deleted", { label: "Undo", run: undo });
  }
}
