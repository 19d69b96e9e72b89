/**
 * An answer as it comes: Markdown in, nodes of the page out, at a cost that does not grow with what was written before.
 *
 *   const renderer = createRenderer(element, { onCopy: copyAndSay });
 *   renderer.update(textSoFar); // as often as there is something new; once a frame is enough
 *   renderer.finish(); // nothing more will come
 *
 * A top-level block is complete when the block behind it has begun for certain. It is then rendered once, from its own text, and its
 * nodes are never touched again, but for one that uses a link's name which is defined further down. Only the last block is rendered
 * again and again, and of it only what changed reaches the page. However the text was cut, the result is the same.
 * The style of all this is style/render.css.
 */

import { copy } from "../app/dom.js";
import { textOf } from "./code.js";
import { patch } from "./patch.js";
import { sanitise } from "./sanitise.js";
import { blocks, html, md } from "./syntax.js";
import { calm } from "./unfinished.js";

const COPIED = 1600; // milliseconds that a button says so
const listeners = new WeakMap(); // element -> what puts code of it on the clipboard

/** A renderer into this element, which is emptied. `onCopy(text)` puts a block of code on the clipboard; false where it could not. */
export function createRenderer(element, { onCopy = copy } = {}) {
  if (!listeners.has(element)) element.addEventListener("click", press);
  listeners.set(element, onCopy);
  return new Renderer(element);
}

class Renderer {
  constructor(element) {
    this.element = element;
    this.#reset();
  }

  /** The text so far. One that does not go on from the last begins anew. */
  update(text) {
    if (text === this.text) return;
    if (this.finished || !text.startsWith(this.text)) this.#reset();
    this.text = text;
    if (text.endsWith("\r")) return; // half a line break
    const lines = this.#lines();
    const groups = this.#read(lines);
    const certain = groups.length - 1 - unsure(groups, lines.length - 1);
    const end = certain > 0 ? groups[certain - 1].lines[1] : 0;
    this.#show(lines, end, end > 0 ? undefined : groups);
  }

  /** All of it is here. */
  finish() {
    if (this.finished) return;
    const lines = this.#lines();
    this.#show(lines, lines.length);
    this.finished = true;
  }

  #reset() {
    this.text = "";
    this.tail = 0; // where in the text the incomplete blocks begin
    this.complete = 0; // how many nodes are
    this.references = {}; // links' names in the complete blocks
    this.named = []; // complete blocks that may use a link's name: { at, text }
    this.finished = false;
    this.element.replaceChildren();
  }

  #lines() {
    return this.text.slice(this.tail).replace(/\r\n?/g, "\n").split("\n");
  }

  /** The blocks of lines that are not complete: what they define holds among them only. */
  #read(lines, pending = false) {
    return blocks(lines.join("\n"), { references: { ...this.references }, pending });
  }

  /** Complete the lines before `end`; show the others as they are, whose blocks may be known. */
  #show(lines, end, groups) {
    const nodes = end > 0 ? this.#finish(lines.slice(0, end)) : [];
    const newlyComplete = nodes.length;
    if (end < lines.length) {
      const begun = lines.slice(end);
      const text = calm(begun.join("\n"), groups ?? this.#read(begun));
      nodes.push(...render(this.#read(text.split("\n"), true)));
    }
    patch(this.element, this.complete, nodes);
    this.complete += newlyComplete;
    this.tail = behind(this.text, this.tail, end);
  }

  #finish(lines) {
    const before = Object.keys(this.references).length;
    const groups = blocks(lines.join("\n"), { references: this.references });
    groups.forEach((group, at) => {
      const text = lines.slice(...group.lines).join("\n");
      if (text.includes("[")) this.named.push({ at: this.complete + at, text });
    });
    if (Object.keys(this.references).length > before) this.#resolve();
    return render(groups);
  }

  /** Links whose name has only now been defined. */
  #resolve() {
    for (const { at, text } of this.named) {
      if (at >= this.complete || !uses(text, this.references)) continue;
      const holder = document.createDocumentFragment();
      const next = this.element.childNodes[at + 1] ?? null;
      holder.append(this.element.childNodes[at]);
      patch(holder, 0, render(this.#read(text.split("\n"))));
      this.element.insertBefore(holder, next);
    }
  }
}

const render = (groups) => [...sanitise(html(groups)).children];

/** How many blocks before the last may still change: 1 where the last one's beginning is not certain, with so many lines ended. */
function unsure(groups, ended) {
  const last = groups.at(-1);
  if (last === undefined) return 0;
  const needed = { table_open: last.lines[0] + 2, maths_block: last.lines[1] }[last.tokens[0].type] ?? last.lines[0] + 1;
  return needed <= ended ? 0 : 1;
}

/** The place so many lines behind `from`. */
function behind(text, from, lines) {
  const ends = /\r\n?|\n/g;
  ends.lastIndex = from;
  for (let line = 0; line < lines; line++) if (ends.exec(text) === null) return text.length;
  return lines > 0 ? ends.lastIndex : from;
}

function uses(text, references) {
  const plain = md.utils.normalizeReference(text);
  return Object.keys(references).some((name) => plain.includes(`[${name}]`));
}

async function press({ target, currentTarget }) {
  const button = target.closest("button.code-copy, button.code-wrap");
  if (button === null) return;
  const block = button.closest(".code");
  if (button.matches(".code-wrap")) {
    button.setAttribute("aria-pressed", String(block.classList.toggle("wrapped")));
    return;
  }
  if ((await listeners.get(currentTarget)(textOf(block))) === false) return;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), COPIED);
}
