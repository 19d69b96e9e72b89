/** Dialogs: the browser's own, which hold the focus, close with Escape and give the focus back. */

import { $ } from "./dom.js";

/** Make the close buttons, and a click beside them, close the dialogs of the page. */
export function prepareDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    for (const button of dialog.querySelectorAll("[data-close]")) button.addEventListener("click", () => dialog.close());
    let began = false;
    dialog.addEventListener("pointerdown", (event) => {
      began = event.target === dialog;
    });
    dialog.addEventListener("click", (event) => {
      if (began && event.target === dialog && dialog.id !== "key") dialog.close();
    });
  }
}

/** Ask for the server's key: the key, or null where nobody wants to give one. */
export function askForKey(wasWrong) {
  const dialog = $("key");
  const input = $("key-input");
  $("key-note").textContent = wasWrong ? "That is not this server's key." : "";
  input.value = "";
  return new Promise((resolve) => {
    let given = null;
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      if (input.value.trim() === "") return;
      given = input.value.trim();
      dialog.close();
    };
    $("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => resolve(given);
    dialog.showModal();
    input.focus();
  });
}

/** Ask whether something that cannot be undone is meant: true or false. */
export function confirmed(question, note, action) {
  const dialog = $("confirm");
  $("confirm-title").textContent = question;
  $("confirm-note").textContent = note;
  $("confirm-yes").textContent = action;
  return new Promise((resolve) => {
    let meant = false;
    $("confirm-form").onsubmit = () => {
      meant = true;
    };
    dialog.onclose = () => resolve(meant);
    dialog.showModal();
    $("confirm-no").focus();
  });
}

/** Ask for a conversation's title: the title, or null. */
export function askForTitle(title) {
  const dialog = $("rename");
  const input = $("rename-input");
  input.value = title;
  return new Promise((resolve) => {
    let given = null;
    $("rename-form").onsubmit = (event) => {
      event.preventDefault();
      given = input.value.trim() || null;
      if (given !== null) dialog.close();
    };
    dialog.onclose = () => resolve(given);
    dialog.showModal();
    input.select();
  });
}
