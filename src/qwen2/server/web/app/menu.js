/** A small menu at a button: arrow keys, Escape, and a click beside it close it; the focus goes back to its button. */

import { el, icon } from "./dom.js";

let close = () => {};

/** `items`: { icon, label, run, bad } */
export function openMenu(button, items) {
  close();
  const choose = (run) => () => {
    close();
    run();
  };
  const buttons = items.map((item) =>
    el(
      "button",
      { type: "button", role: "menuitem", class: item.bad ? "bad" : null, click: choose(item.run) },
      icon(item.icon),
      item.label,
    ),
  );
  const menu = el("div", { class: "menu", role: "menu", "aria-label": button.getAttribute("aria-label") }, ...buttons);
  document.body.append(menu);
  place(menu, button);
  button.setAttribute("aria-expanded", "true");
  const beside = (event) => {
    if (!menu.contains(event.target) && !button.contains(event.target)) close();
  };
  close = () => {
    close = () => {};
    const inside = menu.contains(document.activeElement);
    menu.remove();
    button.setAttribute("aria-expanded", "false");
    document.removeEventListener("pointerdown", beside);
    if (inside)
      (button.isConnected
        ? button
        : document.querySelector(`button[aria-label="${CSS.escape(button.getAttribute("aria-label"))}"]`)
      )?.focus();
  };
  document.addEventListener("pointerdown", beside);
  menu.addEventListener("keydown", (event) => move(event, buttons));
  buttons[0].focus();
}

function move(event, buttons) {
  const at = buttons.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: -1 }[event.key];
  if (event.key === "Escape" || event.key === "Tab") close();
  else if (to !== undefined) buttons.at(to % buttons.length).focus();
  else return;
  event.preventDefault();
  event.stopPropagation();
}

function place(menu, button) {
  const at = button.getBoundingClientRect();
  const { width, height } = menu.getBoundingClientRect();
  const below = at.bottom + height + 8 < innerHeight;
  menu.style.left = `${Math.max(8, Math.min(at.right - width, innerWidth - width - 8))}px`;
  menu.style.top = `${below ? at.bottom + 4 : Math.max(8, at.top - height - 4)}px`;
}
