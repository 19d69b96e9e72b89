/**
 * An answer as it comes: Markdown in, nodes of the page out, at a cost that does not grow with what was written before.
 *
 *   const renderer = createRenderer(element, { onCopy: (code) => announce("Copied") })
 *   renderer.update(textSoFar)      // as often as there is something new; once a frame is enough
 *   renderer.finish()               // nothing more will come
 *
 * A top-level block is complete when the block behind it has begun for certain. It is then rendered once, from its own text, and its
 * nodes are never touched again, but for one that uses a link's name which is defined further down. Only the last block is rendered
 * again and again, and of it only what changed reaches the page. However the text was cut, the result is the same.
 * The style of all this is style/render.css.
 */

import { copy } from "../app/dom.js";
import { textOf } from "./code.js";
import { blocks, html, md } from "./syntax.js";
import { patch } from "./patch.js";
import { sanitise } from "./sanitise.js";
import { calm } from "./unfinished.js";

const listeners = new WeakMap(); // element -> what is called when code of it was copied
const COPIED = 1600; // milliseconds that a button says so

export function createRenderer(element, { onCopy = () => {} } = {}) {
  let text, tail, done, env, named;
  const reset = () => {
    text = ""; // all of it
    tail = 0; // where in it the last blocks begin
    done = 0; // complete nodes
    env = { references: {} };
    named = []; // complete blocks that may use a link's name: {at, text}
    element.replaceChildren();
  };
  reset();
  if (!listeners.has(element)) element.addEventListener("click", press);
  listeners.set(element, onCopy);

  function show(final) {
    const rest = text.slice(tail).replace(/\r\n?/g, "\n");
    const groups = blocks(rest, { references: { ...env.references } });
    const complete = final ? groups.length : groups.length - 1 - unsure(groups, rest);
    const lines = rest.split("\n");
    const nodes = [];
    let end = 0;
    if (complete > 0 || final) {
      end = final ? lines.length : groups[complete - 1].lines[1];
      const before = Object.keys(env.references).length;
      const finished = blocks(lines.slice(0, end).join("\n"), env);
      nodes.push(...render(finished, env));
      finished.forEach((group, at) => {
        const source = lines.slice(...group.lines).join("\n");
        if (source.includes("[")) named.push({ at: done + at, text: source });
      });
      if (Object.keys(env.references).length > before) resolve();
    }
    const begun = lines.slice(end).join("\n");
    const fresh = nodes.length;
    if (!final) nodes.push(...render(...unfinished(begun, end === 0 ? groups : undefined)));
    patch(element, done, nodes);
    done += fresh;
    tail = behind(text, tail, end);
  }

  function unfinished(begun, groups = blocks(begun, { references: { ...env.references } })) {
    const pending = { references: { ...env.references }, pending: true };
    const shown = calm(begun, groups);
    return [blocks(shown, pending), pending];
  }

  // Links whose name has only now been defined.
  function resolve() {
    for (const { at, text: source } of named.filter((one) => one.at < done && uses(one.text, env.references))) {
      const holder = document.createDocumentFragment();
      const old = element.childNodes[at];
      const next = old.nextSibling;
      holder.append(old);
      patch(holder, 0, render(blocks(source, { references: { ...env.references } }), env));
      element.insertBefore(holder, next);
    }
  }

  return {
    update(newer) {
      if (newer === text) return;
      if (!newer.startsWith(text) || tail > text.length) reset();
      text = newer;
      if (/\r$/.test(text)) return; // half a line break
      show(false);
    },
    finish() {
      if (tail > text.length) return;
      show(true);
      tail = text.length + 1;
    },
  };
}

const render = (groups, env) => [...sanitise(html(groups, env)).children];

// How many blocks before the last may still change: 1 where the last one's beginning is not certain yet.
function unsure(groups, text) {
  const last = groups.at(-1);
  if (last === undefined) return 0;
  const whole = text.split("\n").length - 1; // lines that have ended
  const needed = { table_open: last.lines[0] + 2, maths_block: last.lines[1] }[last.tokens[0].type] ?? last.lines[0] + 1;
  return needed <= whole ? 0 : 1;
}

// The place `lines` lines behind `from`.
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
  const onCopy = listeners.get(currentTarget); // the event forgets its target at the first pause
  const text = textOf(block);
  if (!(await copy(text))) return;
  onCopy(text);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), COPIED);
}
