/** The message field: Enter sends, Shift and Enter make a line, a draft is kept for each conversation. */

import { $, kept } from "./dom.js";
import { Files } from "./files.js";

export class Composer {
  /** `send(text, files)`; gives false where it cannot be sent, and then all stays. `changed()`: the draft is another. */
  constructor(chat, { send, changed }) {
    this.chat = chat;
    this.field = $("draft");
    this.changed = changed;
    this.files = new Files(() => this.#edited());
    this.field.addEventListener("input", () => this.#edited());
    this.field.addEventListener("keydown", (event) => {
      const enter = event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229; // 229: an IME takes it
      if (!enter) return;
      event.preventDefault();
      this.#submit(send);
    });
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit(send);
    });
    $("stop").addEventListener("click", () => chat.stop());
    for (const type of ["open", "path", "node"]) chat.addEventListener(type, () => this.#buttons());
    chat.addEventListener("open", () => this.#opened());
    this.#opened();
  }

  get text() {
    return this.field.value;
  }

  get isEmpty() {
    return this.text.trim() === "" && this.files.list.length === 0;
  }

  focus() {
    this.field.focus();
  }

  /** Put a text into the field. */
  set(text) {
    this.field.value = text;
    this.#edited();
    this.focus();
  }

  get #name() {
    return `draft:${this.chat.isNew ? "new" : this.chat.conversation.id}`;
  }

  #opened() {
    this.field.value = kept.get(this.#name) ?? "";
    this.files.set([]);
    this.#buttons();
  }

  #submit(send) {
    if (this.isEmpty || this.chat.run !== undefined) return;
    const name = this.#name;
    const { text } = this;
    const files = this.files.list;
    if (send(text.trim(), files) === false) return;
    this.field.value = "";
    this.files.set([]);
    kept.set(name, null);
  }

  #edited() {
    kept.set(this.#name, this.text === "" ? null : this.text);
    this.#grow();
    this.#buttons();
    this.changed();
  }

  #grow() {
    if (CSS.supports("field-sizing", "content")) return;
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
  }

  #buttons() {
    const writing = this.chat.run !== undefined;
    const hadFocus = document.activeElement === $("stop") || document.activeElement === $("send");
    $("stop").hidden = !writing;
    $("send").hidden = writing;
    $("send").disabled = this.isEmpty;
    if (hadFocus && !writing) this.focus();
  }
}
