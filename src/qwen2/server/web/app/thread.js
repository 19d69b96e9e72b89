/** The open conversation's messages. While an answer is written, only its own element is touched, once a frame. */

import { children, path } from "./conversation.js";
import { $, el, icon } from "./dom.js";
import { Follow } from "./follow.js";
import { MessageView } from "./message.js";
import { announce, toast } from "./notify.js";

const SUGGESTIONS = [
  ["Explain something", "How does grouped-query attention save memory?"],
  ["Write code", "Write a Python function that merges overlapping intervals, with tests."],
  ["Put into better words", "Make this sound friendlier: your request cannot be processed before Monday."],
  ["Plan", "Plan a quiet three-day weekend in a small town, without a car."],
];

export class Thread {
  /** `models`: opens the picker; `waiting`: what is said before the first token; `suggest`: puts a text into the composer. */
  constructor(chat, { models, waiting, suggest }) {
    this.chat = chat;
    this.waiting = waiting;
    this.views = new Map();
    this.list = $("thread");
    this.follow = new Follow($("scroller"), this.list, $("to-end"));
    this.act = this.#actions(models);
    this.frame = 0;
    for (const [title, text] of SUGGESTIONS) {
      $("suggestions").append(el("button", { type: "button", click: () => suggest(text) }, el("b", {}, title), el("span", {}, text)));
    }
    chat.addEventListener("open", () => this.reset());
    chat.addEventListener("path", () => {
      this.sync();
      if (chat.run !== undefined) announce(""); // so that the next end is news
    });
    chat.addEventListener("text", ({ detail }) => this.#text(detail.node));
    chat.addEventListener("node", ({ detail }) => this.#node(detail));
    this.reset();
  }

  #actions(models) {
    const { chat } = this;
    const busy = () => {
      if (chat.run === undefined) return false;
      toast("An answer is being written: stop it first");
      return true;
    };
    return {
      busy,
      models,
      choose: (id) => busy() || chat.choose(id),
      again: (node) => busy() || this.#toEnd(chat.continueAnswer(node)),
      regenerate: (node) => busy() || this.#toEnd(chat.regenerate(node)),
      edited: (node, text) => busy() || (node.role === "user" ? this.#toEnd(chat.editUser(node, text)) : chat.editAnswer(node, text)),
      remove: async (node) => {
        if (busy()) return;
        const undo = await chat.remove(node);
        toast("Deleted from there on", { label: "Undo", run: undo });
      },
    };
  }

  #toEnd(work) {
    this.follow.toEnd();
    return work;
  }

  /** Another conversation. */
  reset() {
    this.views.clear();
    this.list.replaceChildren();
    this.sync();
    this.follow.toEnd();
  }

  /** The messages of the path: those that are there already stay as they are. */
  sync() {
    const { conversation } = this.chat;
    const nodes = path(conversation);
    const wanted = new Set(nodes.map((node) => node.id));
    for (const [id, view] of this.views) {
      if (wanted.has(id)) continue;
      view.element.remove();
      this.views.delete(id);
    }
    let before = null;
    for (const node of nodes) {
      let view = this.views.get(node.id);
      if (view === undefined) {
        view = new MessageView(node, this.act);
        this.views.set(node.id, view);
      }
      const place = before === null ? this.list.firstElementChild : before.element.nextElementSibling;
      if (place !== view.element) this.list.insertBefore(view.element, place);
      this.#show(view);
      before = view;
    }
    $("empty").hidden = nodes.length > 0;
  }

  #show(view) {
    const { node } = view;
    const siblings = children(this.chat.conversation, node.parent);
    const index = siblings.indexOf(node);
    const place = { index, total: siblings.length, previous: siblings[index - 1]?.id, next: siblings[index + 1]?.id };
    view.sync(place, node.status === "writing" ? this.waiting(node) : "");
  }

  #text(node) {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.views.get(node.id)?.draw();
    });
  }

  #node({ node, conversation, ended }) {
    if (conversation === undefined || conversation === this.chat.conversation) {
      const view = this.views.get(node.id);
      if (view !== undefined) this.#show(view);
    }
    if (ended)
      announce({ failed: `The answer failed: ${node.error?.message}`, stopped: "Answer stopped" }[node.status] ?? "Answer finished");
  }

  /** Edit the last message of the user. */
  editLast() {
    const last = path(this.chat.conversation).findLast((node) => node.role === "user");
    if (last !== undefined && this.chat.run === undefined) this.views.get(last.id).edit();
  }
}

/** What stands in the empty conversation. */
export function emptyNote(text, button) {
  if ($("empty-note").firstChild?.data === text) return;
  $("empty-note").replaceChildren(text);
  if (button)
    $("empty-note").append(
      el("br"),
      el("button", { class: "button primary", type: "button", click: button.run }, icon("in"), button.label),
    );
}
