/**
 * Blocks of code: the language's name, buttons to copy and to wrap, colours. A block is coloured when it is complete; while it is
 * being written only at lengths that grow by an eighth, so that all of its colouring together costs a few times the last one.
 */

import hljs from "../vendor/highlight/core.js";
import { LANGUAGES } from "./languages.js";
import { sanitise } from "./sanitise.js";

const COLOURED = 100_000; // characters
const WIDE = /[^\n]{80}/;
const states = new WeakMap(); // block -> what of it is coloured

for (const [name, grammar] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, grammar);

/** Build the block around a <pre> that was just rendered. */
export function furnish(block) {
  const code = block.querySelector("code");
  const language = languageOf(code);
  const name = hljs.getLanguage(language)?.name.split(",")[0] ?? (language || "Text");
  const head = make("div", "code-head");
  head.append(make("span", "code-language", name), button("code-wrap", "Wrap"), button("code-copy", "Copy"));
  head.querySelector(".code-wrap").setAttribute("aria-pressed", "false");
  block.prepend(head);
  block.setAttribute("role", "group");
  block.setAttribute("aria-label", `${name} code`);
  states.set(block, { language, coloured: 0, text: "", rest: null });
  paint(block, code.textContent);
}

/** The same block with the text that a newer rendering of it has. False where it is another one. */
export function grow(block, newer) {
  const code = newer.querySelector("code");
  if (states.get(block).language !== languageOf(code)) return false;
  block.classList.toggle("open", newer.classList.contains("open"));
  paint(block, code.textContent);
  return true;
}

export const textOf = (block) => block.querySelector("code").textContent.replace(/\n$/, "");

const languageOf = (code) => code.className.replace(/^language-/, "").toLowerCase();

function paint(block, text) {
  const state = states.get(block);
  const code = block.querySelector("code");
  block.querySelector(".code-wrap").hidden = !WIDE.test(text);
  if (!block.classList.contains("open")) {
    code.replaceChildren(...coloured(text, state.language));
    return;
  }
  const whole = text.lastIndexOf("\n") + 1;
  if (
    !text.startsWith(state.text.slice(0, state.coloured)) ||
    state.rest === null ||
    whole - state.coloured > state.coloured / 8
  ) {
    state.coloured = whole;
    state.rest = document.createTextNode("");
    code.replaceChildren(...coloured(text.slice(0, whole), state.language), state.rest);
  }
  state.rest.data = text.slice(state.coloured);
  state.text = text;
}

function coloured(text, language) {
  if (text.length > COLOURED || hljs.getLanguage(language) === undefined) return [document.createTextNode(text)];
  const { value } = hljs.highlight(text, { language, ignoreIllegals: true });
  return sanitise(`<code>${value}</code>`).firstChild.childNodes;
}

function make(tag, name, text = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

function button(name, text) {
  const element = make("button", name, text);
  element.type = "button";
  return element;
}
