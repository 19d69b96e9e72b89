/**
 * The list of what may stand in an answer. The parser writes no HTML of the author's, so nothing here should ever have to be taken
 * out; it is the second lock, and it knows no script, style, form, frame, image, id or name.
 */

import DOMPurify from "../vendor/dompurify/purify.mjs";

const RULES = {
  ALLOWED_TAGS: [
    "a",
    "blockquote",
    "br",
    "code",
    "div",
    "em",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "kbd",
    "li",
    "ol",
    "p",
    "pre",
    "s",
    "span",
    "strong",
    "sub",
    "sup",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
    "#text",
  ],
  ALLOWED_ATTR: ["aria-label", "class", "dir", "href", "rel", "role", "start", "tabindex", "target", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["aria-label", "class", "dir", "rel", "role", "start", "tabindex", "target", "title"], // DOMPurify takes all others for addresses
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

/** HTML as nodes of this document, in a fragment. */
export function sanitise(html) {
  return document.adoptNode(DOMPurify.sanitize(html, RULES));
}
