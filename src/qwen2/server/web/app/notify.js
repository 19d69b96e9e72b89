/** What is said to people who look elsewhere: toasts, the banner, and the line for screen readers. */

import { $, el } from "./dom.js";

const STAYS = 8000;

/** A line at the lower edge, with a button where something can be undone. */
export function toast(text, action) {
  const shown = el("div", { class: "toast" }, el("span", {}, text));
  const timer = setTimeout(() => shown.remove(), STAYS);
  if (action) {
    const click = () => {
      clearTimeout(timer);
      shown.remove();
      action.run();
    };
    shown.append(el("button", { type: "button", click }, action.label));
  }
  $("toasts").hidePopover();
  $("toasts").replaceChildren(shown);
  $("toasts").showPopover(); // above dialogs too
}

/** Said by screen readers when they have finished their sentence. */
export function announce(text) {
  $("announcer").textContent = text;
}

/** A line under the bar that stays; nothing takes it away. */
export function banner(text) {
  $("banner").textContent = text ?? "";
  $("banner").hidden = !text;
}
