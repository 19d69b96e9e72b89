/**
 * The nodes on the page become those of a newer rendering with as little change as there is, so that a selection, a scrolled block
 * and whatever was typeset or coloured before stay as they are.
 */

import { furnish, grow } from "./code.js";
import { typeset } from "./maths.js";

const FINISHED = ".code, .maths";
const sources = new WeakMap(); // finished element -> the HTML that it was made from

/** Children from `start` on become these nodes. */
export function patch(parent, start, nodes) {
  nodes.forEach((node, at) => {
    const old = parent.childNodes[start + at];
    if (old === undefined) parent.append(finish(node));
    else if (!become(old, node)) parent.replaceChild(finish(node), old);
  });
  while (parent.childNodes.length > start + nodes.length) parent.lastChild.remove();
}

// Make `old` equal to `node`; false where it has to be replaced.
function become(old, node) {
  if (old.nodeName !== node.nodeName) return false;
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== node.data) old.data = node.data;
    return true;
  }
  const source = sources.get(old);
  if ((source !== undefined) !== node.matches(FINISHED)) return false;
  if (source !== undefined) {
    const newer = node.outerHTML;
    if (source === newer) return true;
    if (!node.matches(".code") || !old.matches(".code") || !grow(old, node)) return false;
    sources.set(old, newer);
    return true;
  }
  for (const name of old.getAttributeNames()) if (!node.hasAttribute(name)) old.removeAttribute(name);
  for (const name of node.getAttributeNames()) {
    if (old.getAttribute(name) !== node.getAttribute(name)) old.setAttribute(name, node.getAttribute(name));
  }
  patch(old, 0, [...node.childNodes]);
  return true;
}

// Typeset and colour what is new.
function finish(node) {
  if (node.nodeType !== Node.ELEMENT_NODE) return node;
  for (const element of [node, ...node.querySelectorAll(FINISHED)]) {
    if (!element.matches(FINISHED)) continue;
    sources.set(element, element.outerHTML);
    if (element.matches(".code")) furnish(element);
    else typeset(element);
  }
  return node;
}
