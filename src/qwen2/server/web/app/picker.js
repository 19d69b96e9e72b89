/** The dialog of models: choose one that is here, unload or delete it, or download one. */

import { confirmed } from "./dialogs.js";
import { $, el, icon, iconButton } from "./dom.js";
import { bytes, count } from "./format.js";
import { announce, toast } from "./notify.js";

export class Picker {
  /** `chosen(name)` is called with the model that somebody chose. */
  constructor(chat, models, chosen) {
    this.chat = chat;
    this.models = models;
    this.chosen = chosen;
    this.dialog = $("picker");
    this.search = $("picker-search");
    this.bars = new Map(); // name: the progress that is shown
    $("open-picker").addEventListener("click", () => this.open());
    this.search.addEventListener("input", () => this.#fill());
    models.addEventListener("change", () => this.dialog.open && this.#fill());
    models.addEventListener("progress", ({ detail }) => this.bars.get(detail.name)?.show(detail.pull));
  }

  async open() {
    if (this.dialog.open) return;
    this.search.value = "";
    this.#fill();
    this.dialog.showModal();
    this.search.focus();
    try {
      await this.models.refresh();
      await Promise.all(this.models.here.map((model) => this.models.describe(model.name)));
      this.#fill();
    } catch (error) {
      toast(error.message);
    }
  }

  #fill() {
    this.bars.clear();
    const wanted = this.search.value.trim().toLowerCase();
    const matches = (model) => model.name.toLowerCase().includes(wanted);
    const here = this.models.here.filter(matches);
    const absent = this.models.absent.filter(matches);
    const parts = [];
    if (here.length > 0) parts.push(el("h3", {}, "On this server"), list(here.map((model) => this.#hereRow(model))));
    else if (!wanted) parts.push(el("p", {}, "No model is here yet. The first one below is small and answers quickly."));
    if (absent.length > 0) parts.push(el("h3", {}, "To download"), list(absent.map((model) => this.#absentRow(model))));
    for (const name of this.#others(wanted, [...here, ...absent])) parts.push(list([this.#absentRow({ name })]));
    const focused = document.activeElement?.dataset?.row;
    $("picker-body").replaceChildren(...parts);
    if (focused)
      $("picker-body")
        .querySelector(`[data-row="${CSS.escape(focused)}"]`)
        ?.focus();
  }

  /** Names that were typed in full, or are being downloaded, and stand in no list. */
  #others(wanted, listed) {
    const typed = /^[\w.-]+(\/[\w.-]+|:[\w.-]+)$/.test(wanted) ? [this.search.value.trim()] : [];
    const names = new Set([...typed, ...this.models.pulls.keys()]);
    for (const { name } of [...listed, ...this.models.here, ...this.models.absent]) names.delete(name);
    return names;
  }

  #hereRow(model) {
    const { name } = model;
    const shown = this.models.shown.get(name);
    const current = name === this.chat.conversation.model;
    const facts = [shown?.size, model.details.quantization_level, bytes(model.size), shown && `${count(shown.context)} tokens of context`];
    const line = el("span", { class: "facts" }, facts.filter(Boolean).join(" \u00b7 "));
    if (this.models.isLoaded(name)) line.append(el("span", { class: "loaded" }, " \u00b7 in memory"));
    const choose = () => {
      this.dialog.close();
      this.chosen(name);
    };
    const props = { class: "model", type: "button", "aria-pressed": String(current), click: choose, "data-row": `use ${name}` };
    const row = el("button", props, el("span", {}, el("b", {}, name), line), current ? icon("check") : null);
    const unload = () => this.#told(() => this.#unload(name));
    const remove = () => this.#told(() => this.#remove(model));
    return el(
      "div",
      { class: "model-row" },
      row,
      this.models.isLoaded(name) ? iconButton("eject", `Unload ${name}`, unload, { "data-row": `unload ${name}` }) : null,
      iconButton("bin", `Delete ${name}`, remove, { "data-row": `delete ${name}` }),
    );
  }

  /** Errors are said, and the list is what it is then. */
  async #told(work) {
    try {
      await work();
    } catch (error) {
      toast(error.message);
    }
    if (this.dialog.open && !this.dialog.contains(document.activeElement)) this.search.focus(); // the button has gone
  }

  async #unload(name) {
    const gone = await this.models.unload(name);
    announce(gone ? `${name} is out of memory` : `${name} goes out of memory when its answers have ended`);
    if (!gone) toast(`${name} goes when its answers have ended`);
  }

  async #remove({ name, size }) {
    const note = `${bytes(size)} on the server's disk, for everybody who uses it. Conversations stay; to go on they need another model.`;
    if (!(await confirmed(`Delete ${name}?`, note, "Delete"))) return;
    await this.models.remove(name);
    announce(`${name} is deleted`);
  }

  #absentRow(model) {
    const { name } = model;
    const pull = this.models.pulls.get(name);
    const facts = [model.format, model.size && bytes(model.size), model.licence];
    const text = el(
      "span",
      {},
      el("b", {}, name),
      el("span", { class: "facts" }, model.about ?? ""),
      el("span", { class: "facts" }, facts.filter(Boolean).join(" \u00b7 ")),
    );
    const running = pull !== undefined && pull.error === null;
    const click = () => (running ? this.models.cancel(name) : this.#pull(name));
    const props = {
      class: "button small",
      type: "button",
      click,
      "data-row": `get ${name}`,
      "aria-label": `${running ? "Cancel" : "Download"} ${name}`,
    };
    return el(
      "div",
      { class: "model" },
      text,
      el("button", props, running ? "Cancel" : "Download"),
      running ? this.#bar(name, pull) : null,
      failure(pull),
    );
  }

  #bar(name, pull) {
    const bar = new Bar();
    this.bars.set(name, bar);
    bar.show(pull);
    return bar.element;
  }

  async #pull(name) {
    if (!(await this.models.pull(name))) return;
    announce(`${name} is here`);
    toast(`${name} is here`, this.dialog.open ? undefined : { label: "Use it", run: () => this.chosen(name) });
  }
}

const list = (rows) => el("ul", {}, ...rows.map((row) => el("li", {}, row)));

/** How far a download is: changed in place, so that the button beside it can be pressed. */
class Bar {
  constructor() {
    this.said = el("span", {});
    this.share = el("span", {});
    this.bar = el("progress", { "aria-label": "Download" });
    this.element = el("div", { class: "pulling" }, this.said, this.share, this.bar);
  }

  show({ completed, total, status }) {
    this.said.textContent = status ?? `${bytes(completed)} of ${bytes(total)}`;
    this.share.textContent = total ? `${Math.floor((100 * completed) / total)} %` : "";
    if (!total) return;
    this.bar.max = total;
    this.bar.value = completed;
  }
}

function failure(pull) {
  return pull?.error ? el("p", { class: "pull-error", role: "alert" }, pull.error) : null;
}
