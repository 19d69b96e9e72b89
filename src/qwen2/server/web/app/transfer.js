/**
 * Conversations as files. JSON has a version and is checked field by field when it is read; Markdown is for reading only.
 * { format: "qwen2-conversations", version: 1, exported: time, conversations: [ see conversation.js ] }
 */

import { newId, path } from "./conversation.js";
import { checked } from "./sampling.js";

const FORMAT = "qwen2-conversations";
const VERSION = 1;
const ROLES = ["user", "assistant"];
const ENDS = ["done", "stopped", "length", "failed"];

export function exportJson(conversations, now = new Date()) {
  return JSON.stringify({ format: FORMAT, version: VERSION, exported: now.toISOString(), conversations }, null, 2);
}

/** The conversations of a file, with new ids. An Error says in one line what is wrong with it. */
export function importJson(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (file?.format !== FORMAT) throw new Error("The file holds no conversations that were exported here.");
  if (file.version !== VERSION)
    throw new Error(`The file has version ${JSON.stringify(file.version)}; this page reads version ${VERSION}.`);
  if (!Array.isArray(file.conversations)) throw new Error("The file has no list of conversations.");
  return file.conversations.map((one, index) => conversation(one, `Conversation ${index + 1}`));
}

function conversation(given, at) {
  const read = reader(given, at);
  const nodes = Object.entries(read("nodes", isObject, "messages"));
  const found = {
    id: newId(),
    title: read("title", isText),
    named: read("named", isFlag),
    pinned: read("pinned", isFlag),
    created: read("created", isTime),
    changed: read("changed", isTime),
    model: read("model", (one) => one === null || isText(one)),
    system: read("system", isText),
    sampling: sampling(read("sampling", isObject), at),
    nodes: {},
    chosen: {},
    gone: {},
  };
  for (const [id, one] of nodes) found.nodes[id] = node(id, one, given.nodes, at);
  nodes.forEach(([id]) => checkRoot(found.nodes, id, at));
  for (const [parent, child] of Object.entries(read("chosen", isObject))) {
    if (found.nodes[child] !== undefined && (found.nodes[child].parent ?? "") === parent) found.chosen[parent] = child;
  }
  return found;
}

function node(id, given, all, at) {
  const place = `${at}, message ${id}`;
  const read = reader(given, place);
  const parent = read("parent", (one) => one === null || (isText(one) && Object.hasOwn(all, one)), "message that it follows");
  const found = {
    id,
    parent,
    role: read("role", (one) => ROLES.includes(one)),
    content: read("content", isText),
    files: read("files", (one) => Array.isArray(one) && one.every((file) => isText(file?.name) && isText(file?.text))).map(
      ({ name, text }) => ({ name, text }),
    ),
    created: read("created", isTime),
    changed: read("changed", isTime),
  };
  if (found.role === "user") return found;
  found.model = read("model", (one) => one === null || isText(one));
  const status = read("status", isText);
  found.status = ENDS.includes(status) ? status : "stopped";
  if (found.status === "failed")
    found.error = { message: isText(given.error?.message) ? given.error.message : "The answer failed.", code: null };
  if (given.edited === true) found.edited = true;
  if (isObject(given.stats)) found.stats = Object.fromEntries(Object.entries(given.stats).filter(([, value]) => Number.isFinite(value)));
  return found;
}

/** Every message leads to a beginning: in a ring of messages nothing could be shown. */
function checkRoot(nodes, id, at) {
  const seen = new Set();
  for (let one = nodes[id]; one.parent !== null; one = nodes[one.parent]) {
    if (seen.has(one.id)) throw new Error(`${at}: its messages follow each other in a ring.`);
    seen.add(one.id);
  }
}

function sampling(given, at) {
  try {
    return checked(given);
  } catch (error) {
    throw new Error(`${at}: ${error.message}.`);
  }
}

function reader(given, at) {
  if (!isObject(given)) throw new Error(`${at} is not an object.`);
  return (name, isRight, shown = name) => {
    if (!Object.hasOwn(given, name) || !isRight(given[name])) throw new Error(`${at} has no proper ${shown}.`);
    return given[name];
  };
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isText = (value) => typeof value === "string";
const isFlag = (value) => typeof value === "boolean";
const isTime = (value) => Number.isFinite(value) && value >= 0;

/** The path that is shown, for people. */
export function exportMarkdown(conversation) {
  const parts = [`# ${conversation.title || "Conversation"}`];
  if (conversation.system.trim()) parts.push(`> ${conversation.system.trim().replaceAll("\n", "\n> ")}`);
  for (const node of path(conversation)) {
    parts.push(`## ${node.role === "user" ? "You" : (node.model ?? "Answer")}`);
    for (const { name, text } of node.files) parts.push(`**${name}**\n\n${fence(text)}`);
    if (node.content) parts.push(node.content);
  }
  return `${parts.join("\n\n")}\n`;
}

function fence(text) {
  const longest = Math.max(2, ...Array.from(text.matchAll(/`+/g), (found) => found[0].length));
  const mark = "`".repeat(longest + 1);
  return `${mark}\n${text.replace(/\n$/, "")}\n${mark}`;
}

/** A title as a file's name. */
export function fileName(title, ending) {
  const name = title
    .normalize("NFC")
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 60);
  return `${name || "conversation"}.${ending}`;
}
