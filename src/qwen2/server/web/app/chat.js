/**
 * What the page does: the conversation that is open, those in which an answer is being written, and every change to them.
 * Views listen: "open" (another conversation), "path" (other messages), "node" (one message), "text" (its text grew), "list".
 * Left out: anything that is seen.
 */

import { ServerError } from "./api.js";
import { countStopped, write } from "./answering.js";
import { addMessage, choose, lastWritten, merge, newConversation, removeFrom, restore, titleOf, touch } from "./conversation.js";
import { kept } from "./dom.js";

const SAVE_EVERY = 2000; // milliseconds of writing that a crash may cost
const REPLY = 400; // in which another tab says that it writes

export class Chat extends EventTarget {
  constructor(storage) {
    super();
    this.storage = storage;
    this.runs = new Map(); // conversation's id: { conversation, node, controller }
    this.saving = new Map(); // conversation's id: the save that runs
    this.known = new Set(); // ids that are stored
    this.conversation = newConversation(this.defaults);
    this.channel = new BroadcastChannel("qwen2-writing");
    this.channel.onmessage = ({ data }) => this.#heard(data);
    storage?.onChange((change) => this.#changedElsewhere(change));
  }

  emit(type, detail = {}) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  // --- which conversation

  /** What new conversations begin with. */
  get defaults() {
    return { ...JSON.parse(kept.get("defaults") ?? "{}"), model: kept.get("model") };
  }

  set defaults({ system, sampling }) {
    kept.set("defaults", JSON.stringify({ system, sampling }));
  }

  get isNew() {
    return !this.known.has(this.conversation.id);
  }

  /** The run of the open conversation, where there is one. */
  get run() {
    return this.runs.get(this.conversation.id);
  }

  start() {
    this.conversation = newConversation(this.defaults);
    this.emit("open");
  }

  /** Open a stored conversation; false where it is not there. */
  async open(id) {
    const found = this.runs.get(id)?.conversation ?? (await this.storage?.get(id));
    if (found === undefined) return false;
    this.known.add(id);
    this.conversation = found;
    this.emit("open");
    await this.#findWriters(found);
    return true;
  }

  // --- messages

  async send(content, files) {
    const { conversation } = this;
    const parent = lastWritten(conversation)?.id ?? null;
    const node = addMessage(conversation, parent, "user", content, { files });
    await this.answer(conversation, node.id);
  }

  /** Another answer beside the one that is there; a message without one gets its first. */
  async regenerate(node) {
    await this.answer(this.conversation, node.role === "user" ? node.id : node.parent);
  }

  /** A message of the user, changed: a branch of its own. */
  async editUser(node, content) {
    const { conversation } = this;
    const copy = addMessage(conversation, node.parent, "user", content, { files: node.files });
    if (!conversation.named && node.parent === null) conversation.title = titleOf(copy);
    await this.answer(conversation, copy.id);
  }

  /** An answer, changed where it stands. */
  async editAnswer(node, content) {
    node.content = content;
    node.edited = true;
    node.status = "done";
    delete node.error;
    touch(this.conversation, node);
    this.emit("node", { node });
    await this.save(this.conversation);
  }

  async choose(id) {
    choose(this.conversation, id);
    this.emit("path");
    await this.save(this.conversation);
  }

  /** Remove a message and what follows it; the function that is given back undoes that. */
  async remove(node) {
    const { conversation } = this;
    const removed = removeFrom(conversation, node.id);
    this.emit("path");
    await this.save(conversation);
    return async () => {
      restore(conversation, removed);
      this.emit("path");
      await this.save(conversation);
    };
  }

  // --- answers

  async answer(conversation, parent) {
    const node = addMessage(conversation, parent, "assistant", "", { model: conversation.model, status: "writing" });
    await this.continueAnswer(node, conversation);
  }

  /** Write on from what the answer has; a failed or stopped one goes on, an empty one begins. */
  async continueAnswer(node, conversation = this.conversation) {
    const run = {
      conversation,
      node,
      controller: new AbortController(),
      saved: performance.now(),
      clock: {},
      before: node.content === "" ? 0 : (node.stats?.tokens ?? 0),
    };
    node.status = "writing";
    delete node.error;
    this.runs.set(conversation.id, run);
    touch(conversation, node);
    this.emit("path");
    this.emit("list");
    run.finished = this.#writing(run);
    await run.finished;
  }

  async #writing(run) {
    const { conversation, node, controller } = run;
    await this.save(conversation);
    const begin = performance.now();
    try {
      await write(conversation, node, controller.signal, () => this.#wrote(run, begin));
    } catch (error) {
      await this.#ended(run, error);
    }
    this.runs.delete(conversation.id);
    touch(conversation, node);
    this.emit("node", { node, conversation, ended: true });
    this.emit("list");
    await this.save(conversation);
  }

  stop() {
    this.run?.controller.abort();
  }

  #wrote(run, begin) {
    const now = performance.now();
    run.clock.firstSeconds ??= (now - begin) / 1000;
    run.clock.decodeSeconds = (now - begin) / 1000 - run.clock.firstSeconds;
    if (run.conversation === this.conversation) this.emit("text", { node: run.node });
    if (now - run.saved > SAVE_EVERY) {
      run.saved = now;
      touch(run.conversation, run.node);
      this.save(run.conversation);
    }
  }

  async #ended(run, error) {
    const { node } = run;
    if (error.name === "AbortError") {
      node.status = "stopped";
      try {
        await countStopped(node, run.clock, run.before);
      } catch (failed) {
        if (!(failed instanceof ServerError)) throw failed;
        delete node.stats; // the count is lost with the server, the text is not
      }
      return;
    }
    if (!(error instanceof ServerError)) throw error;
    node.status = "failed";
    node.error = { message: error.message, code: error.code };
  }

  // --- keeping

  /** Keep a conversation; calls while one is being kept are one call after it. */
  async save(conversation) {
    if (this.storage === null) return;
    const { id } = conversation;
    this.known.add(id);
    const running = this.saving.get(id);
    if (running !== undefined) {
      running.again = true;
      await running.promise;
      return;
    }
    const entry = { again: false };
    entry.promise = this.#saveUntilStill(conversation, entry);
    this.saving.set(id, entry);
    try {
      await entry.promise;
    } finally {
      this.saving.delete(id);
    }
  }

  async #saveUntilStill(conversation, entry) {
    do {
      entry.again = false;
      try {
        this.#absorb(conversation, await this.storage.save(conversation));
      } catch (error) {
        this.emit("unsaved", { message: error.message });
      }
    } while (entry.again);
    this.emit("list");
  }

  /** Take over what another state of the conversation has; the objects that views hold stay the same ones. */
  #absorb(conversation, other) {
    const merged = merge(other, conversation);
    const before = new Set(Object.keys(conversation.nodes));
    let changed = false;
    for (const [id, node] of Object.entries(merged.nodes)) {
      const mine = conversation.nodes[id];
      if (mine === undefined) conversation.nodes[id] = node;
      else if (mine !== node && mine.changed < node.changed) Object.assign(mine, node);
      else continue;
      changed = true;
    }
    for (const id of before) {
      if (id in merged.nodes) continue;
      delete conversation.nodes[id];
      changed = true;
    }
    const chosen = { ...merged.chosen, ...conversation.chosen }; // what another tab looks at does not move this one
    Object.assign(conversation, merged, { nodes: conversation.nodes, chosen });
    if (changed && conversation === this.conversation) this.emit("path");
  }

  async change(id, fields) {
    const conversation =
      id === this.conversation.id ? this.conversation : (this.runs.get(id)?.conversation ?? (await this.storage.get(id)));
    Object.assign(conversation, fields);
    conversation.changed = Math.max(Date.now(), conversation.changed + 1);
    if (this.known.has(id) || conversation !== this.conversation) await this.save(conversation);
    this.emit("list");
    if (conversation === this.conversation) this.emit("settings");
  }

  /** Delete a conversation; the function that is given back undoes that. */
  async delete(id) {
    const run = this.runs.get(id);
    run?.controller.abort();
    await run?.finished; // it keeps what came
    const conversation = id === this.conversation.id ? this.conversation : await this.storage.get(id);
    await this.saving.get(id)?.promise;
    this.known.delete(id);
    await this.storage.remove(id);
    if (id === this.conversation.id) this.start();
    this.emit("list");
    return async () => {
      await this.storage.save(conversation);
      this.emit("list");
      await this.open(id);
    };
  }

  // --- other tabs

  async #changedElsewhere({ kind, id }) {
    this.emit("list");
    const conversation = this.runs.get(id)?.conversation ?? (id === this.conversation.id ? this.conversation : null);
    if (conversation === null) return;
    if (kind === "removed") {
      this.known.delete(id);
      if (!this.runs.has(id) && conversation === this.conversation) this.start();
      return;
    }
    const stored = await this.storage.get(id);
    if (stored !== undefined) this.#absorb(conversation, stored);
    if (conversation === this.conversation) this.emit("settings");
  }

  /** An answer that was being written when its page went away has stopped, unless another tab says that it writes it. */
  async #findWriters(conversation) {
    const orphans = Object.values(conversation.nodes).filter((node) => node.status === "writing" && !this.runs.has(conversation.id));
    if (orphans.length === 0) return;
    this.alive = new Set();
    this.channel.postMessage({ kind: "who", id: conversation.id });
    await new Promise((done) => setTimeout(done, REPLY));
    const stopped = orphans.filter((node) => node.status === "writing" && !this.alive.has(node.id) && !this.runs.has(conversation.id));
    for (const node of stopped) {
      node.status = "stopped";
      touch(conversation, node);
      if (conversation === this.conversation) this.emit("node", { node, conversation });
    }
    if (stopped.length > 0) await this.save(conversation);
  }

  #heard({ kind, id, node }) {
    if (kind === "who" && this.runs.has(id)) this.channel.postMessage({ kind: "writing", node: this.runs.get(id).node.id });
    if (kind === "writing") this.alive?.add(node);
  }
}
