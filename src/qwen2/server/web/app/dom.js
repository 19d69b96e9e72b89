/** Elements and icons without markup in strings: nothing of the page is ever parsed as HTML. */

const SVG = "http://www.w3.org/2000/svg";

/** The element of index.html with this id. */
export const $ = (id) => document.getElementById(id);

/**
 * A new element. Of `props`, functions are listeners, true is an empty attribute, false and null are left out, all else is text.
 * `el("button", { class: "button", type: "button", click: send }, "Send")`
 */
export function el(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** One of the symbols of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(SVG, "use"));
  setIcon(svg, name);
  return svg;
}

/** Show another symbol. */
export function setIcon(svg, name) {
  svg.firstElementChild.setAttribute("href", `#i-${name}`);
}

/** A button that shows an icon and says its name to those who do not see it. */
export function iconButton(name, label, click, props = {}) {
  return el("button", { class: "icon-button", type: "button", "aria-label": label, title: label, click, ...props }, icon(name));
}

/** Call `work` once, `ms` after the last call. */
export function debounced(work, ms) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...values), ms);
  };
}

/** What this browser keeps of small settings; where storage is switched off, until the page closes. */
export const kept = {
  memory: new Map(),
  get(name) {
    try {
      return localStorage.getItem(name);
    } catch {
      return this.memory.get(name) ?? null;
    }
  },
  set(name, value) {
    try {
      if (value === null) localStorage.removeItem(name);
      else localStorage.setItem(name, value);
    } catch {
      this.memory.set(name, value);
    }
  },
};

/** Put a text on the clipboard; false where the browser does not allow it. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = el("textarea", { class: "unseen", "aria-hidden": "true" });
    field.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    const done = document.execCommand("copy"); // the way for pages that are served without TLS
    field.remove();
    return done;
  }
}

/** Give the browser a file to keep. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: url, download: name, hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
