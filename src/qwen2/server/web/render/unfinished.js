/**
 * How the end of a text looks while it is still being written: what a half-written mark would do to the text around it is held
 * back until it is known. Only what is shown changes; once a block is complete it is rendered from its own text.
 */

import { isOpen } from "./syntax.js";
import { formulaEnd } from "./maths.js";

// A last line that could still become anything: a rule, a list, a heading's underline, the end of a fence, a formula.
const UNDECIDED = /^(?:[\s>\-+*_=~`#|:$\\]|\d{1,9}[.)])*(?:\[[ xX]?\]?)?$/;
const FENCE = /^[\s>]*(?:`{3,}[^`\n]*|~{3,}[^\n]*)$/;
const DELIMITERS = /^\s*\|?[\s\-:|]*$/;

/** The text to show for a tail whose blocks, read strictly, are these. */
export function calm(text, groups) {
  const last = groups.at(-1)?.tokens.findLast((token) => token.nesting === 0);
  const start = text.lastIndexOf("\n") + 1;
  const line = text.slice(start);
  if (last?.type === "fence" && isOpen(last)) {
    if (/^[\s>]*(?:`+|~+)$/.test(line)) return text.slice(0, start);
    return FENCE.test(line) && last.content === "" ? text.slice(0, start) + line.replace(/(`{3,}|~{3,}).*/, "$1") : text;
  }
  if (last?.type === "code_block") return text;
  const block = groups.at(-1);
  const kind = block?.tokens[0].type;
  const table = kind === "paragraph_open" ? tableBegun(text) : null;
  if (table !== null) return table;
  if (kind === "table_open" && block.lines[1] - block.lines[0] === 2) return text; // its delimiters
  if (line !== "" && UNDECIDED.test(line)) return text.slice(0, start);
  return closed(text, groups);
}

// The head of a table is one from its first bar on.
function tableBegun(text) {
  const lines = text.replace(/\n$/, "").split("\n");
  let head = lines.at(-1);
  if (lines.length > 1 && /^\s*\|/.test(lines.at(-2)) && DELIMITERS.test(head)) {
    lines.pop();
    head = lines.at(-1);
  }
  if (!/^\s{0,3}\|.*[^\s|]/.test(head)) return null;
  const inside = head.trim().replace(/^\||(?<!\\)\|$/g, "");
  const cells = inside.split(/(?<!\\)\|/).length;
  return `${lines.join("\n")}\n|${"---|".repeat(cells)}`;
}

// Emphasis, code and links that were opened are closed, if the text ends inside them.
function closed(text, groups) {
  const inlines = groups.at(-1)?.tokens.filter((token) => token.type === "inline" && token.content !== "") ?? [];
  const content = inlines.at(-1)?.content.trimEnd() ?? "";
  const trimmed = text.trimEnd();
  const lastLine = content.slice(content.lastIndexOf("\n") + 1);
  if (lastLine === "" || text.endsWith("\n\n") || !trimmed.endsWith(lastLine)) return text;
  const { keep, add } = ending(content);
  const cut = content.length - keep;
  return cut <= lastLine.length ? trimmed.slice(0, trimmed.length - cut) + add : text;
}

/** How many characters of an inline text to keep, and what to add, so that every mark in it is closed. */
export function ending(text) {
  const open = []; // {mark, count} of emphasis
  const special = /[\\$`*_~[!<]/g;
  for (let at = 0; ;) {
    special.lastIndex = at;
    at = special.exec(text)?.index ?? -1;
    if (at < 0) return result(text, text.length, open);
    const mark = text[at];
    const rest = text.slice(at);
    if (rest.length === 1 && /[\\!<[]/.test(mark)) return result(text, at, open);
    if (mark === "$" || /^\\[([]/.test(rest)) {
      const end = formulaEnd(text, at);
      if (end < 0 && mark === "\\") return { keep: text.length, add: "" }; // shown as a formula in the making
      at = end < 0 ? at + 1 : end;
    } else if (mark === "\\") at += 2;
    else if (mark === "`") {
      const run = /^`+/.exec(rest)[0];
      if (run === rest) return result(text, at, open);
      const end = rest.slice(run.length).search(new RegExp(`(?<!\`)${run}(?!\`)`));
      if (end < 0) return result(text, text.replace(/`+$/, "").length, open, run);
      at += end + 2 * run.length;
    } else if (/[*_~]/.test(mark)) {
      const run = /^(?:\*+|_+|~+)/.exec(rest)[0];
      if (!emphasis(text, at, run, open)) return result(text, at, open);
      at += run.length;
    } else {
      const link = /^\[((?:[^[\]\\]|\\.|\[[^[\]]*\])*)\]\(([^)]*)$/.exec(rest);
      if (link !== null) return result(text, at, open, `[${link[1]}](<>)`);
      at += 1;
    }
  }
}

function result(text, keep, open, add = "") {
  const marks = open.reduce((after, { mark, count }) => mark.repeat(count) + after, "");
  const kept = add || !marks ? keep : text.slice(0, keep).trimEnd().length;
  return { keep: kept, add: add + marks };
}

// Count a run of marks; false for one at the text's end that opens what nothing is in yet.
function emphasis(text, at, run, open) {
  const before = text[at - 1] ?? " ";
  const after = text[at + run.length];
  const word = /[\p{L}\p{N}]/u;
  const mark = run[0];
  let count = run.length;
  const mayClose = /\S/.test(before) && !(mark === "_" && after !== undefined && word.test(after));
  const mayOpen =
    after !== undefined && /\S/.test(after) && !(mark === "_" && word.test(before)) && !(mark === "~" && count !== 2);
  while (mayClose && count > 0) {
    const found = open.findLastIndex((one) => one.mark === mark);
    if (found < 0) break;
    const used = Math.min(count, open[found].count);
    count -= used;
    open[found].count -= used;
    open.splice(open[found].count > 0 ? found + 1 : found);
  }
  if (count > 0 && mayOpen) open.push({ mark, count });
  return !(count > 0 && after === undefined && !(mark === "_" && word.test(before)));
}
