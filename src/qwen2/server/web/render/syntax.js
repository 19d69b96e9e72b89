/**
 * Markdown to HTML: CommonMark with GitHub's tables, task lists and strike-through, bare links, maths.
 *
 * Whatever an answer holds, the HTML is ours: tags in the text stay text, but for a few without attributes that models write inside
 * tables. Links lead to http, https and mailto only; images become links, since loading one would tell its server that it was read.
 * Left out: footnotes, definition lists, headings' ids.
 */

import MarkdownIt from "../vendor/markdown-it/markdown-it.mjs";
import { addMaths } from "./maths.js";

const NESTING = 60;
const LINK = /^(?:https?:\/\/|mailto:)/i;
const TAG = /^<(\/?)(br|kbd|sub|sup)(\s*\/?)>/i;

export const md = new MarkdownIt({ html: false, linkify: true, maxNesting: NESTING });
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false }).add("ftp:", null).add("//", null);
md.validateLink = (url) => url === "" || LINK.test(url);
addMaths(md);
md.inline.ruler.before("html_inline", "plain_tag", plainTag);
md.core.ruler.push("chat", finishTokens);

/** Top-level blocks: their tokens and lines [first, behind the last]. */
export function blocks(text, env) {
  const groups = [];
  for (const token of md.parse(text, env)) {
    if (token.level === 0 && token.nesting >= 0) groups.push({ tokens: [], lines: token.map });
    groups.at(-1).tokens.push(token);
  }
  const lines = text.split("\n");
  for (const group of groups) {
    const tooDeep = group.tokens.some((token) => token.level >= NESTING - 1);
    if (tooDeep) group.tokens = [asSource(lines.slice(...group.lines).join("\n"))];
  }
  return groups;
}

/** Of these blocks. */
export function html(groups) {
  const tokens = groups.flatMap((group) => group.tokens);
  return md.renderer.render(tokens, md.options, {});
}

// Nested deeper than is read: nothing of it is lost, it is shown as it was written.
function asSource(text) {
  const { Token } = new md.core.State("", md, {});
  const token = new Token("code_block", "code", 0);
  token.content = text;
  return token;
}

/** Whether a fence has no closing line yet. */
export function isOpen({ content, map }) {
  const lines = content === "" ? 0 : content.replace(/\n$/, "").split("\n").length;
  return map[1] - map[0] < lines + 2;
}

function plainTag(state, silent) {
  const found = TAG.exec(state.src.slice(state.pos, Math.min(state.posMax, state.pos + 12)));
  if (found === null || (found[2].toLowerCase() === "br" && found[1])) return false;
  if (!silent) state.push("plain_tag", "", 0).content = `<${found[1]}${found[2].toLowerCase()}>`;
  state.pos += found[0].length;
  return true;
}

// Directions, alignments without style attributes, boxes of task lists, targets of links, images as links.
function finishTokens(state) {
  const { tokens } = state;
  tokens.forEach((token, at) => {
    if (token.level === 0 && token.nesting === 1) token.attrSet("dir", "auto");
    const align = token.attrGet("style");
    if (align !== null) token.attrs = [["class", align.replace("text-align:", "align-")]];
    if (token.type === "inline") {
      finishInline(token.children, state.Token);
      if (tokens[at - 2]?.type === "list_item_open") finishTask(tokens[at - 2], token, state.Token);
    }
  });
  const last = tokens.findLast((token) => token.nesting === 0);
  if (state.env.pending === true && last?.type === "fence" && isOpen(last)) last.meta = { open: true };
}

function finishInline(children, Token) {
  let within = 0;
  children.forEach((token, at) => {
    if (token.type === "link_open") leave(token);
    within += token.type === "link_open" ? 1 : token.type === "link_close" ? -1 : 0;
    if (token.type !== "image") return;
    const name = new Token("text", "", 0);
    name.content = token.content || "image";
    children[at] = [name];
    const source = token.attrGet("src");
    if (within > 0 || !source) return;
    const open = new Token("link_open", "a", 1);
    open.attrs = [
      ["href", source],
      ["class", "image"],
    ];
    leave(open);
    children[at] = [open, name, new Token("link_close", "a", -1)];
  });
  children.splice(0, children.length, ...children.flat());
}

function leave(link) {
  if (link.attrGet("href") === "") link.attrs = [];
  else {
    link.attrSet("target", "_blank");
    link.attrSet("rel", "noopener noreferrer");
  }
}

function finishTask(item, inline, Token) {
  const first = inline.children[0];
  const found = first?.type === "text" ? /^\[([ xX])\](?:\s+|$)/.exec(first.content) : null;
  if (found === null) return;
  const box = new Token("task", "", 0);
  box.meta = { done: found[1] !== " " };
  first.content = first.content.slice(found[0].length);
  inline.children.unshift(box);
  item.attrJoin("class", "task-item");
}

const { escapeHtml } = md.utils;
const code = (content, language, open) =>
  `<div class="code${open ? " open" : ""}" dir="ltr"><pre tabindex="0"><code class="${escapeHtml(language)}">${escapeHtml(content)}</code></pre></div>`;

Object.assign(md.renderer.rules, {
  plain_tag: (tokens, at) => tokens[at].content,
  task: (tokens, at) => {
    const { done } = tokens[at].meta;
    return `<span class="task${done ? " done" : ""}" role="img" aria-label="${done ? "done" : "to do"}"></span>`;
  },
  fence: (tokens, at) => {
    const { content, info, meta } = tokens[at];
    const [name] = md.utils
      .unescapeAll(info)
      .trim()
      .split(/[\s,{]/);
    return code(content, name && `language-${name.slice(0, 40)}`, meta?.open);
  },
  code_block: (tokens, at) => code(tokens[at].content, "", false),
  table_open: () => '<div class="table" dir="auto" role="group" aria-label="Table" tabindex="0"><table>',
  table_close: () => "</table></div>",
});
