/** The settings of the open conversation, and what new ones begin with. Every change holds from the next answer on. */

import { ServerError } from "./api.js";
import { $, el } from "./dom.js";
import { count } from "./format.js";
import { toast } from "./notify.js";
import { SAMPLING, read, shown } from "./sampling.js";

export class Settings {
  constructor(chat, models) {
    this.chat = chat;
    this.models = models;
    this.fields = new Map();
    for (const setting of SAMPLING) $("sampling").append(this.#field(setting));
    $("open-settings").addEventListener("click", () => this.open());
    $("system").addEventListener("change", () => this.#keep({ system: $("system").value }));
    $("settings-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#isRight()) $("settings").close();
    });
    $("settings-reset").addEventListener("click", () => {
      this.#keep({ system: "", sampling: {} });
      this.#fill();
    });
    $("settings-default").addEventListener("click", () => {
      if (!this.#isRight()) return;
      const { system, sampling } = this.chat.conversation;
      this.chat.defaults = { system, sampling };
      toast("New chats begin with these settings");
      $("settings").close();
    });
  }

  async open() {
    this.#fill();
    $("settings").showModal();
    const { model } = this.chat.conversation;
    this.#about(null);
    if (!model) return;
    try {
      this.#about(await this.models.describe(model), model);
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      toast(error.message);
    }
  }

  #field(setting) {
    const id = `set-${setting.key}`;
    const props = { id, autocomplete: "off", "aria-describedby": `${id}-hint` };
    const input = setting.texts
      ? el("textarea", { ...props, rows: "2", dir: "auto", spellcheck: "false" })
      : el("input", { ...props, type: "text", inputmode: "decimal" });
    const hint = el("span", { class: "hint", id: `${id}-hint` }, setting.hint);
    const label = el("label", { class: "field" }, el("span", { class: "field-name" }, setting.label), hint, input);
    this.fields.set(setting.key, { setting, input, hint, label });
    input.addEventListener("change", () => this.#changed(setting.key));
    if (!setting.texts) input.addEventListener("keydown", (event) => this.#stepped(event, setting));
    return label;
  }

  /** Arrow keys go up and down from the value, or from the model's own. */
  #stepped(event, { key, min, max, step }) {
    const sign = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (sign === undefined) return;
    event.preventDefault();
    const { input } = this.fields.get(key);
    const from = Number(input.value === "" ? (input.dataset.own ?? 0) : input.value);
    if (!Number.isFinite(from)) return;
    input.value = String(Math.min(max, Math.max(min, Number((from + sign * step).toFixed(2)))));
    this.#changed(key);
  }

  #changed(key) {
    const { setting, input } = this.fields.get(key);
    const { value, error } = read(setting, input.value);
    this.#mark(key, error);
    if (error) return;
    const sampling = { ...this.chat.conversation.sampling };
    delete sampling[key];
    this.#keep({ sampling: value === undefined ? sampling : { ...sampling, [key]: value } });
  }

  #mark(key, error) {
    const { setting, input, hint, label } = this.fields.get(key);
    label.classList.toggle("wrong", Boolean(error));
    input.setAttribute("aria-invalid", String(Boolean(error)));
    hint.textContent = error ?? setting.hint;
  }

  #isRight() {
    for (const [key, { input }] of this.fields) this.#changed(key, input.value);
    this.#keep({ system: $("system").value });
    const wrong = [...this.fields.values()].find(({ label }) => label.classList.contains("wrong"));
    wrong?.input.focus();
    return wrong === undefined;
  }

  #keep(fields) {
    const { conversation } = this.chat;
    const same = Object.entries(fields).every(([key, value]) => JSON.stringify(value) === JSON.stringify(conversation[key]));
    if (!same) this.chat.change(conversation.id, fields);
  }

  #fill() {
    const { system, sampling } = this.chat.conversation;
    $("system").value = system;
    for (const [key, { setting, input }] of this.fields) {
      input.value = shown(setting, sampling[key]);
      this.#mark(key, undefined);
    }
  }

  #about(found, model) {
    for (const [key, { input }] of this.fields) {
      const own = found?.defaults[key];
      input.placeholder = own ?? { seed: "drawn", max_tokens: "to the end", stop: "model's own" }[key] ?? "off";
      if (own === undefined) delete input.dataset.own;
      else input.dataset.own = own;
    }
    if (found === null) {
      $("about").replaceChildren(el("dt", {}, "No model"), el("dd", {}, "Choose one first"));
      return;
    }
    const facts = [
      ["Name", model],
      ["Parameters", found.size],
      ["Quantization", found.quantization],
      ["Context", `${count(found.context)} tokens`],
      ["Licence", found.licence],
      ["In memory", this.models.isLoaded(model) ? `yes, on ${this.models.memory.get(model).device}` : "no"],
    ];
    $("about").replaceChildren(...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
  }
}
