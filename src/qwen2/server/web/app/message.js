/** One message on the page. Its text is touched by nobody else, and touches nobody else. */

import { createRenderer } from "../render/markdown.js";
import { copy, el, icon, iconButton, setIcon } from "./dom.js";
import { bytes, stats } from "./format.js";
import { announce } from "./notify.js";

const LONG = 1600; // characters of a user's message above which it is folded

export class MessageView {
  /** `act`: what the buttons do, see thread.js. */
  constructor(node, act) {
    this.node = node;
    this.act = act;
    this.isUser = node.role === "user";
    this.element = el("li", { class: `message ${node.role}`, "data-id": node.id });
    this.heading = el("h2", { class: "unseen" }, this.isUser ? "You" : (node.model ?? "Answer"));
    this.body = el("div", this.isUser ? { class: "user-body" } : { class: "prose", dir: "auto" });
    this.notes = el("div", { class: "notes" });
    this.under = el("div", { class: "under" });
    this.element.append(this.heading, this.body, this.notes, this.under);
    this.shownAs = null;
  }

  /** Show the node as it is now, if anything of it has changed. `place`: { index, total } among its siblings. */
  sync(place, waiting) {
    const { node } = this;
    const state = [node.changed, node.status, place.index, place.total, waiting].join("|");
    if (state === this.shownAs) return;
    this.shownAs = state;
    const writing = node.status === "writing";
    this.element.classList.toggle("streaming", writing);
    if (writing) this.element.setAttribute("aria-busy", "true");
    else this.element.removeAttribute("aria-busy");
    if (this.form === undefined) this.#fill(writing);
    this.notes.replaceChildren(...this.#notes(writing, waiting));
    this.under.replaceChildren(...this.#under(place));
  }

  #fill(writing) {
    if (this.isUser) {
      this.#fillUser();
      return;
    }
    this.draw();
    if (!writing) {
      this.renderer?.finish();
      this.renderer = undefined;
    }
  }

  /** The answer's text so far: cheap, once a frame. */
  draw() {
    const { content } = this.node;
    if (content !== "" && this.waiting !== undefined) {
      this.waiting.remove();
      this.waiting = undefined;
    }
    if (content === this.drawn && this.renderer === undefined) return;
    this.renderer ??= this.#newRenderer();
    this.renderer.update(content);
    this.drawn = content;
  }

  #newRenderer() {
    this.body.replaceChildren();
    return createRenderer(this.body, { onCopy: copied });
  }

  #fillUser() {
    const { content, files } = this.node;
    const bubble = el("div", { class: "bubble", dir: "auto" }, content);
    const parts = [...files.map(fileView), bubble];
    if (content.length > LONG) {
      bubble.classList.add("long");
      const click = () => {
        const folded = bubble.classList.toggle("long");
        more.textContent = folded ? "Show all" : "Show less";
        more.setAttribute("aria-expanded", String(!folded));
      };
      const more = el("button", { class: "more", type: "button", "aria-expanded": "false", click }, "Show all");
      parts.push(more);
    }
    this.body.replaceChildren(...parts);
  }

  #notes(writing, waiting) {
    const { node, act } = this;
    this.waiting = undefined;
    if (writing && node.content === "") {
      this.waiting = el("p", { class: "waiting" }, waiting);
      return [this.waiting];
    }
    if (node.status === "failed") {
      const again = el("button", { class: "button small", type: "button", click: () => act.again(node) }, "Try again");
      const models = el("button", { class: "button small", type: "button", click: () => act.models() }, "Choose a model");
      const buttons = node.error.code === "model_not_found" ? [models, again] : [again];
      return [el("div", { class: "failure" }, el("span", {}, node.error.message), ...buttons)];
    }
    const why = { stopped: "Stopped.", length: "Ended at its limit of tokens." }[node.status];
    return why ? [el("p", { class: "ending" }, why)] : [];
  }

  #under({ index, total, previous, next }) {
    const { node, act } = this;
    const parts = [];
    if (total > 1) {
      const at = el("span", { "aria-label": `Version ${index + 1} of ${total}` }, `${index + 1}/${total}`);
      const left = iconButton("left", "Previous version", () => act.choose(previous), { disabled: !previous });
      const right = iconButton("right", "Next version", () => act.choose(next), { disabled: !next });
      parts.push(el("span", { class: "branches" }, left, at, right));
    }
    const actions = [];
    if (this.isUser || node.content !== "") {
      actions.push(iconButton("copy", "Copy", (event) => this.#copy(event.currentTarget)));
      actions.push(iconButton("pen", this.isUser ? "Edit" : "Edit answer", () => this.edit(), { "data-do": "edit" }));
    }
    if (!this.isUser) {
      actions.push(iconButton("again", "Regenerate", () => act.regenerate(node)));
      if (["stopped", "length"].includes(node.status)) actions.push(iconButton("play", "Continue", () => act.again(node)));
    }
    actions.push(iconButton("bin", "Delete from here", () => act.remove(node)));
    parts.push(el("span", { class: "actions" }, ...actions));
    if (!this.isUser && node.stats) parts.push(el("span", { class: "stats" }, stats(node.stats).join(" \u00b7 ")));
    if (node.edited) parts.push(el("span", {}, "edited"));
    return parts;
  }

  async #copy(button) {
    if (!(await copy(this.node.content))) return;
    const shown = button.querySelector(".icon");
    setIcon(shown, "check");
    announce("Copied");
    setTimeout(() => setIcon(shown, "copy"), 1600);
  }

  /** A field in place of the text. */
  edit() {
    if (this.form !== undefined) return;
    const { node, act, isUser } = this;
    const field = el("textarea", { dir: "auto", "aria-label": isUser ? "Edit your message" : "Edit the answer" });
    field.value = node.content;
    const close = () => {
      this.form.remove();
      this.form = undefined;
      this.body.hidden = this.under.hidden = false;
      this.element.querySelector("[data-do=edit]")?.focus();
    };
    const submit = (event) => {
      event.preventDefault();
      const text = field.value;
      if ((text.trim() === "" && node.files.length === 0) || act.busy()) return;
      close();
      if (text !== node.content || (isUser && node.status === "failed")) act.edited(node, text);
    };
    const keydown = (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (isUser && !event.shiftKey))) submit(event);
    };
    const row = el(
      "div",
      { class: "edit-row" },
      el("button", { class: "button small quiet", type: "button", click: close }, "Cancel"),
      el("button", { class: "button small primary", type: "submit" }, isUser ? "Send" : "Save"),
    );
    this.form = el("form", { class: "edit", submit, keydown }, field, row);
    this.body.hidden = this.under.hidden = true;
    this.body.after(this.form);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

async function copied(text) {
  const done = await copy(text);
  if (done) announce("Code copied");
  return done;
}

function fileView({ name, text }) {
  const size = el("span", { class: "file-size" }, bytes(new Blob([text]).size));
  const summary = el("summary", {}, icon("text"), el("span", { class: "file-name", dir: "auto" }, name), size);
  return el("details", { class: "file" }, summary, el("pre", { dir: "auto", tabindex: "0" }, text));
}
