/** Keys for what hands do often, and the dialog that lists them. */

import { $, el } from "./dom.js";

const MAC = /Mac|iPhone|iPad/.test(navigator.platform);
const MOD = MAC ? "\u2318" : "Ctrl";

/** `act`: newChat, search, stop, editLast, focus, models, settings; stop gives false where nothing was stopped. */
export function shortcuts(act) {
  const keys = [
    { keys: ["Enter"], label: "Send" },
    { keys: ["Shift", "Enter"], label: "New line" },
    { keys: [MOD, "Shift", "O"], label: "New chat", run: act.newChat },
    { keys: [MOD, "K"], label: "Search conversations", run: act.search },
    { keys: [MOD, "M"], label: "Models", run: act.models },
    { keys: [MOD, ","], label: "Settings of this conversation", run: act.settings },
    { keys: ["Esc"], label: "Stop the answer" },
    { keys: ["\u2191"], label: "Edit your last message (from the empty field)" },
    { keys: ["/"], label: "Go to the message field" },
    { keys: ["?"], label: "This list" },
  ];
  for (const { keys: names, label } of keys) {
    $("keys").append(
      el("dt", {}, label),
      el("dd", {}, ...names.flatMap((name, index) => (index ? [" ", el("kbd", {}, name)] : [el("kbd", {}, name)]))),
    );
  }
  const help = () => $("help").showModal();
  $("open-help").addEventListener("click", help);
  addEventListener("keydown", (event) => {
    if (event.isComposing || event.defaultPrevented || document.querySelector("dialog[open]") !== null) return;
    const run = byModifier(event, keys) ?? plain(event, act, help);
    if (run === undefined || run() === false) return;
    event.preventDefault();
  });
}

function byModifier(event, keys) {
  if (!(MAC ? event.metaKey : event.ctrlKey) || event.altKey) return undefined;
  const key = event.key.toUpperCase();
  return keys.find(({ keys: names, run }) => run && names.at(-1) === key && names.includes("Shift") === event.shiftKey)?.run;
}

function plain(event, act, help) {
  if (event.ctrlKey || event.metaKey || event.altKey) return undefined;
  if (event.key === "Escape") return act.stop;
  const { target } = event;
  if (target === $("draft")) return event.key === "ArrowUp" && target.value === "" ? act.editLast : undefined;
  if (target.matches?.("input, textarea, select")) return undefined;
  return { "/": act.focus, "?": help }[event.key];
}
