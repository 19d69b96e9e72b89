/**
 * What a conversation is: a tree of messages, of which one path is shown.
 *
 * { id, title, named, pinned, created, changed, model, system, sampling,
 *   nodes: { id: node }, chosen: { parent: child }, gone: { id: time } }
 * node: { id, parent, role, content, files: [{ name, text }], created, changed, model?, status?, error?, stats?, edited? }
 * status of an answer: writing, done, stopped, length, failed. Plain data, so that IndexedDB and JSON keep it as it is.
 */

const ROOT = "";
const TITLE_LENGTH = 64;

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export function newConversation({ model = null, system = "", sampling = {} } = {}) {
  const now = Date.now();
  return {
    id: newId(),
    title: "",
    named: false,
    pinned: false,
    created: now,
    changed: now,
    model,
    system,
    sampling: { ...sampling },
    nodes: {},
    chosen: {},
    gone: {},
  };
}

/** Children of a node (null: the roots), oldest first. */
export function children(conversation, parent) {
  return Object.values(conversation.nodes)
    .filter((node) => node.parent === parent)
    .sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

/** The messages that are shown, first to last. One pass over the nodes, whatever their number. */
export function path(conversation) {
  const byParent = new Map();
  for (const node of Object.values(conversation.nodes)) {
    const key = node.parent ?? ROOT;
    const chosen = byParent.get(key);
    const wanted = conversation.chosen[key];
    if (chosen === undefined || node.id === wanted || (chosen.id !== wanted && node.created > chosen.created)) byParent.set(key, node);
  }
  const found = [];
  for (let node = byParent.get(ROOT); node !== undefined; node = byParent.get(node.id)) found.push(node);
  return found;
}

/**
 * What a new message follows: the last message that is shown. Where another tab still writes an answer, what came before its
 * question: the model never reads half an answer, and the message is a branch beside that question.
 */
export function lastWritten(conversation) {
  const shown = path(conversation);
  const writing = shown.find((node) => node.status === "writing");
  return writing === undefined ? shown.at(-1) : conversation.nodes[conversation.nodes[writing.parent]?.parent];
}

/** The messages from the beginning to this one. */
export function pathTo(conversation, id) {
  const found = [];
  for (let node = conversation.nodes[id]; node !== undefined; node = conversation.nodes[node.parent]) found.unshift(node);
  return found;
}

/** A new message under `parent` (null: a beginning), chosen. */
export function addMessage(conversation, parent, role, content, more = {}) {
  const siblings = children(conversation, parent);
  const created = Math.max(Date.now(), (siblings.at(-1)?.created ?? 0) + 1); // order is kept when clocks are coarse
  const node = { id: newId(), parent, role, content, files: [], created, changed: created, ...more };
  conversation.nodes[node.id] = node;
  choose(conversation, node.id);
  if (!conversation.title && role === "user") conversation.title = titleOf(node);
  return node;
}

/** Show the branch of this message. */
export function choose(conversation, id) {
  conversation.chosen[conversation.nodes[id].parent ?? ROOT] = id;
  conversation.changed = Date.now();
}

/** Say that a node has changed, for `merge`. */
export function touch(conversation, node) {
  node.changed = Math.max(Date.now(), node.changed + 1);
  conversation.changed = node.changed;
}

/** Remove a message and all that follows it; gives back what was removed. */
export function removeFrom(conversation, id) {
  const removed = [];
  const walk = (node) => {
    children(conversation, node.id).forEach(walk);
    removed.push(node);
    delete conversation.nodes[node.id];
    conversation.gone[node.id] = Math.max(Date.now(), node.changed);
  };
  walk(conversation.nodes[id]);
  conversation.changed = Date.now();
  return removed;
}

/** Put back what was removed. */
export function restore(conversation, removed) {
  for (const node of removed) {
    conversation.nodes[node.id] = node;
    node.changed = Math.max(Date.now(), conversation.gone[node.id] + 1);
    delete conversation.gone[node.id];
  }
  choose(conversation, removed.at(-1).id);
}

/** Its first line, cut. */
export function titleOf(node) {
  const text = node.content.trim() || node.files.map((file) => file.name).join(", ");
  const line = (text.split("\n").find((one) => one.trim()) ?? "").trim();
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}\u2026` : line;
}

/**
 * Two states of one conversation, as two tabs may have them: no message of either is lost. Of a message that both have, the
 * one changed last stays; the same holds for title, settings and the branch that is shown.
 */
export function merge(stored, mine) {
  const [older, newer] = stored.changed > mine.changed ? [mine, stored] : [stored, mine];
  const merged = { ...older, ...newer, nodes: {}, chosen: { ...older.chosen, ...newer.chosen }, gone: { ...older.gone } };
  for (const [id, time] of Object.entries(newer.gone)) merged.gone[id] = Math.max(time, merged.gone[id] ?? 0);
  for (const node of [...Object.values(older.nodes), ...Object.values(newer.nodes)]) {
    const other = merged.nodes[node.id];
    if (other === undefined || node.changed >= other.changed) merged.nodes[node.id] = node;
  }
  for (const [id, time] of Object.entries(merged.gone)) {
    if (id in merged.nodes && merged.nodes[id].changed <= time) delete merged.nodes[id];
    else if (id in merged.nodes) delete merged.gone[id];
  }
  for (const [id, node] of Object.entries(merged.nodes)) {
    if (node.parent !== null && merged.gone[node.parent] !== undefined) delete merged.nodes[id]; // its branch was removed elsewhere
  }
  return merged;
}

/** What the list shows of a conversation. */
export function summary(conversation) {
  const { id, title, pinned, created, changed } = conversation;
  return { id, title, pinned, created, changed };
}

/** Where a text stands in titles and messages: null, or a few words around the place ("" where it is the title). */
export function find(conversation, wanted) {
  if (conversation.title.toLowerCase().includes(wanted)) return "";
  for (const node of Object.values(conversation.nodes)) {
    for (const text of [node.content, ...node.files.map((file) => file.text)]) {
      const place = text.toLowerCase().indexOf(wanted);
      if (place >= 0) return excerpt(text, place, wanted.length);
    }
  }
  return null;
}

function excerpt(text, place, length) {
  const before = Math.max(0, place - 20);
  const begin = before === 0 ? 0 : Math.min(place, before + text.slice(before, place).search(/\s|$/)); // not in a word
  const words = text
    .slice(begin, place + length + 48)
    .replace(/\s+/g, " ")
    .trim();
  return begin > 0 ? `\u2026${words}` : words;
}

/** A message's text as the model reads it: attached files come first, fenced and named. */
export function fullText(node) {
  return [...node.files.map(fenced), node.content].filter((text) => text !== "").join("\n\n");
}

function fenced({ name, text }) {
  const longest = Math.max(2, ...Array.from(text.matchAll(/`+/g), (found) => found[0].length));
  const fence = "`".repeat(longest + 1);
  return `${name}:\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
}

/** The messages as the server takes them. */
export function asMessages(conversation, nodes) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  return [...system, ...nodes.map((node) => ({ role: node.role, content: fullText(node) }))];
}
