/**
 * Maths between $..$, $$..$$, \(..\) and \[..\]: rules for the Markdown parser, and the typesetting of what they find.
 *
 * The parser only marks a formula and keeps its source as text; KaTeX makes its nodes later, in the page's own document, after
 * everything else was sanitised. It builds them by DOM calls and sets styles through the CSSOM, which the policy of the page
 * allows, and without `trust` it makes neither links nor images nor attributes of the author's choice.
 * Left out: environments that stand alone (\begin{align} outside of maths), formulas across empty lines.
 */

import "../vendor/katex/katex.js";

const { katex } = globalThis;
const PAIRS = { $$: "$$", "\\[": "\\]", "\\(": "\\)", $: "$" };
const LINES = 400; // of one formula
const DOLLARS = 1000; // characters that may stand between single dollars
const SOURCE = 20_000; // characters that are typeset
const STYLED = /\\(?:fcolorbox|pmb)(?![a-zA-Z])/; // their MathML has style attributes, which the policy refuses

export function addMaths(md) {
  md.block.ruler.before("fence", "maths_block", blockRule, { alt: ["paragraph", "reference", "blockquote", "list"] });
  md.inline.ruler.before("escape", "maths", inlineRule);
  const html = (tag) => (tokens, at) => {
    const { content, meta } = tokens[at];
    const kind = `maths${meta.display ? " display" : ""}${meta.pending ? " pending" : ""}`;
    return `<${tag} class="${kind}" dir="ltr">${md.utils.escapeHtml(content)}</${tag}>`;
  };
  md.renderer.rules.maths_block = html("div");
  md.renderer.rules.maths = html("span");
}

// A formula that begins its own line and ends another one, or the same.
function blockRule(state, start, end, silent) {
  if (state.sCount[start] - state.blkIndent >= 4) return false;
  const open = opener(line(state, start));
  if (open !== "$$" && open !== "\\[") return false;
  const last = lastLine(state, start, end, PAIRS[open]);
  const pending = last === null && state.env.pending === true;
  if (last === undefined || (last === null && !pending)) return false;
  if (silent) return true;
  const after = pending ? end : last + 1;
  const token = state.push("maths_block", "div", 0);
  token.content = state.getLines(start, after, state.blkIndent, false).trim();
  token.meta = { display: true, pending };
  token.map = [start, after];
  state.line = after;
  return true;
}

// The line that closes the formula; null where the text ends before, undefined where it is none.
function lastLine(state, start, end, close) {
  for (let at = start; at < Math.min(end, start + LINES); at++) {
    if (at > start && (state.isEmpty(at) || state.sCount[at] < state.blkIndent)) return undefined;
    const text = line(state, at).trimEnd();
    const found = text.indexOf(close, at === start ? 2 : 0);
    if (found >= 0) return found === text.length - close.length && !(at === start && found === 2) ? at : undefined;
  }
  return end - start > LINES ? undefined : null;
}

const line = (state, at) => state.src.slice(state.bMarks[at] + state.tShift[at], state.eMarks[at]);
const opener = (text, at = 0) => Object.keys(PAIRS).find((open) => text.startsWith(open, at));

// A formula amid words.
function inlineRule(state, silent) {
  const { src, pos, posMax } = state;
  const open = opener(src, pos);
  if (open === undefined) return false;
  let end = formulaEnd(src, pos, posMax);
  const pending = end < 0 && state.env.pending === true && open !== "$";
  if (pending) end = posMax;
  if (end < 0) return false;
  if (!silent) {
    const token = state.push("maths", "span", 0);
    token.content = src.slice(pos, end);
    token.meta = { display: open === "$$" || open === "\\[", pending };
  }
  state.pos = end;
  return true;
}

/** Behind the formula that begins here, or -1. */
export function formulaEnd(text, at, limit = text.length) {
  const open = opener(text, at);
  const dollars = open.startsWith("$");
  const from = at + open.length;
  if (open === "$" && !/^[^\s]$/.test(text[from] ?? " ")) return -1;
  if (open === "$" && /[\p{L}\p{N}$]/u.test(text[at - 1] ?? " ")) return -1;
  let end = text.indexOf(PAIRS[open], from);
  while (dollars && end >= 0 && escaped(text, end)) end = text.indexOf(PAIRS[open], end + 1);
  if (end < 0 || end + open.length > limit) return -1;
  const inside = text.slice(from, end);
  if (!inside.trim() || (dollars && inside.includes("`"))) return -1;
  return open === "$" && isMoney(inside, text[end + 1] ?? " ") ? -1 : end + open.length;
}

// "$5 and $6" is no formula: before the closing dollar is a space, or behind it a digit, or inside it an amount and words.
function isMoney(inside, next) {
  if (inside.length > DOLLARS || /\s$/.test(inside) || /[\d$]/.test(next)) return true;
  return /^[\d.,]+\s*(?:[-/\u2013]\s*$|\p{L}{2,})/u.test(inside) && !/[\\^_={}<>+]/.test(inside);
}

function escaped(text, at) {
  let slashes = 0;
  while (text[at - 1 - slashes] === "\\") slashes++;
  return slashes % 2 === 1;
}

/** What the parser marked becomes a formula; one that KaTeX cannot read stays as it was written, and says why. */
export function typeset(element) {
  if (element.classList.contains("pending")) return;
  const source = element.textContent;
  const open = opener(source);
  const display = element.classList.contains("display");
  const tex = source.slice(open.length, source.length - PAIRS[open].length);
  try {
    if (tex.length > SOURCE) throw new RangeError(`longer than ${SOURCE} characters`);
    const plain = STYLED.test(tex);
    katex.render(tex, element, {
      output: plain ? "html" : "htmlAndMathml",
      displayMode: display,
      throwOnError: true,
      trust: false,
      strict: "ignore",
      maxSize: 40,
      maxExpand: 500,
    });
    if (plain) {
      element.setAttribute("role", "math");
      element.setAttribute("aria-label", tex);
    }
  } catch (error) {
    if (!(error instanceof katex.ParseError || error instanceof RangeError)) throw error;
    element.textContent = source;
    element.classList.add("bad");
    element.title = error.message;
  }
}
