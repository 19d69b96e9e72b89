/** How much of the model's window the conversation and the draft take, and what to do before it is full. */

import { api, ServerError } from "./api.js";
import { asMessages, path } from "./conversation.js";
import { $, debounced } from "./dom.js";
import { count } from "./format.js";

const NEAR = 0.85;
const AFTER = 500; // milliseconds without a key

export class Meter {
  /** `models.loaded` says which models are in memory: only those are asked, so that typing loads none. */
  constructor(chat, models, composer) {
    this.chat = chat;
    this.models = models;
    this.composer = composer;
    this.controller = new AbortController();
    this.soon = debounced(() => this.measure(), AFTER);
    for (const type of ["open", "path", "settings"]) chat.addEventListener(type, () => this.soon());
    chat.addEventListener("node", ({ detail }) => this.#answered(detail));
    chat.addEventListener("open", () => this.show(null));
  }

  #answered({ node, conversation }) {
    const { stats } = node;
    const limit = this.models.limit(node.model);
    if (conversation === this.chat.conversation && stats?.promptTokens !== undefined && limit)
      this.show(stats.promptTokens + stats.tokens, limit);
    this.soon();
  }

  /** Ask the server how long it all is. */
  async measure() {
    this.controller.abort();
    const { conversation, run } = this.chat;
    const { model } = conversation;
    const nodes = path(conversation).filter((node) => node.content !== "" || node.files.length > 0);
    const draft = { role: "user", content: this.composer.text.trim(), files: this.composer.files.list };
    if (!this.composer.isEmpty) nodes.push(draft);
    if (run !== undefined) return;
    if (nodes.length === 0 || !this.models.isLoaded(model)) {
      this.#remembered(nodes, model);
      return;
    }
    this.controller = new AbortController();
    const { signal } = this.controller;
    try {
      await this.models.refreshLoaded(); // it may have been unloaded since
      if (!this.models.isLoaded(model)) {
        this.#remembered(nodes, model);
        return;
      }
      const found = await api.tokenize({ model, messages: asMessages(conversation, nodes) }, signal);
      if (!signal.aborted) this.show(found.count, found.max_model_len);
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof ServerError)) throw error;
      if (error.name !== "AbortError") this.show(null); // no count is shown rather than a wrong one
    }
  }

  /** What the last answer's usage said, where its model is not in memory. */
  #remembered(nodes, model) {
    const { stats } = nodes.findLast((node) => node.role === "assistant") ?? {};
    const limit = this.models.limit(model);
    if (stats?.promptTokens !== undefined && limit !== undefined) this.show(stats.promptTokens + stats.tokens, limit);
    else this.show(null);
  }

  show(used, limit) {
    $("meter").hidden = used === null;
    const share = used === null ? 0 : used / limit;
    $("meter").className = `meter${share >= 1 ? " over" : share >= NEAR ? " near" : ""}`;
    $("warning").textContent = advice(share, used, limit);
    if (used === null) return;
    $("meter-text").textContent = `${count(used)} / ${count(limit)} tokens`;
    $("meter-bar").value = Math.min(1, share);
  }
}

function advice(share, used, limit) {
  if (share >= 1) {
    return `This is ${count(used)} tokens, and the model reads ${count(limit)}. Shorten it, delete messages from an earlier point, or start a new chat.`;
  }
  if (share < NEAR) return "";
  return `Room for ${count(limit - used)} more tokens. A new chat, or a branch from an earlier message, gives more.`;
}
