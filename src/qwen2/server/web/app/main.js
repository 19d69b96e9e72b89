/** Puts the page together: storage, the conversation, its views. Nothing is loaded from anywhere but this server. */

import { onKeyWanted } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { Data } from "./data.js";
import { askForKey, prepareDialogs } from "./dialogs.js";
import { $, kept, setIcon } from "./dom.js";
import { List } from "./list.js";
import { Meter } from "./meter.js";
import { Models } from "./models.js";
import { banner } from "./notify.js";
import { Picker } from "./picker.js";
import { Settings } from "./settings.js";
import { shortcuts } from "./shortcuts.js";
import { Storage } from "./storage.js";
import { Thread, emptyNote } from "./thread.js";

const NARROW = matchMedia("(max-width: 800px)");

async function openStorage() {
  try {
    return await Storage.open();
  } catch (error) {
    banner(`Conversations end with this page: ${error.message}. Allow this page to store data to keep them.`);
    return null;
  }
}

function sidebar() {
  const shell = $("shell");
  const fold = (folded) => {
    shell.classList.toggle("folded", folded && !NARROW.matches);
    shell.classList.toggle("open", !folded && NARROW.matches);
    $("scrim").hidden = folded || !NARROW.matches;
    $("open-sidebar").setAttribute("aria-expanded", String(!folded));
    if (!NARROW.matches) kept.set("folded", folded ? "yes" : null);
  };
  const shut = () => {
    fold(true);
    $("open-sidebar").focus();
  };
  $("open-sidebar").addEventListener("click", () => {
    fold(false);
    $("close-sidebar").focus();
  });
  $("close-sidebar").addEventListener("click", shut);
  $("scrim").addEventListener("click", shut);
  $("sidebar").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !NARROW.matches || event.defaultPrevented) return;
    event.stopPropagation();
    shut();
  });
  NARROW.addEventListener("change", () => fold(NARROW.matches || kept.get("folded") === "yes"));
  fold(NARROW.matches || kept.get("folded") === "yes");
  return { open: () => fold(false), closeOnPhone: () => NARROW.matches && fold(true) };
}

function theme() {
  const order = { system: "light", light: "dark", dark: "system" };
  const icons = { system: "auto", light: "sun", dark: "moon" };
  const show = () => {
    const now = kept.get("theme") ?? "system";
    setIcon($("theme").querySelector(".icon"), icons[now]);
    $("theme").setAttribute("aria-label", `Colours: ${now}. Change to ${order[now]}`);
    $("theme").title = `Colours: ${now}`;
  };
  $("theme").addEventListener("click", () => {
    const next = order[kept.get("theme") ?? "system"];
    kept.set("theme", next === "system" ? null : next);
    dispatchEvent(new Event("themechange"));
    show();
  });
  addEventListener("storage", show);
  show();
}

/** The address names the conversation, so that reloading, going back and a second tab find it. */
function address(chat, drawer) {
  const open = async () => {
    const id = location.hash.slice(1);
    if (id === "" || id === chat.conversation.id || !(await chat.open(id))) {
      if (id === "" && !chat.isNew) chat.start();
      else if (id !== "" && id !== chat.conversation.id) history.replaceState(null, "", location.pathname);
    }
    drawer.closeOnPhone();
  };
  const show = () => {
    const { conversation, isNew } = chat;
    const wanted = isNew ? "" : `#${conversation.id}`;
    if (location.hash !== wanted) history.pushState(null, "", wanted || location.pathname);
    document.title = conversation.title ? `${conversation.title} \u2013 qwen2` : "qwen2";
  };
  addEventListener("hashchange", open);
  addEventListener("popstate", open);
  for (const type of ["open", "list"]) chat.addEventListener(type, show);
  return open();
}

/** The model that answers; a new conversation whose model, which is the one chosen last, is not here takes one that is. */
function showModel(chat, models, picker) {
  const { conversation } = chat;
  if (chat.isNew && !models.isHere(conversation.model)) conversation.model = models.nearest;
  const { model } = conversation;
  $("model-name").textContent = model ?? "Choose a model";
  $("open-picker").setAttribute("aria-label", model ? `Model: ${model}. Change it` : "Choose a model");
  if (models.here.length === 0) emptyNote("There is no model on this server yet.", { label: "Download one", run: () => picker.open() });
  else emptyNote(model ? `${model} answers on your own server. Nothing goes elsewhere.` : "Choose a model above, and ask.");
}

async function start() {
  prepareDialogs();
  onKeyWanted(askForKey);
  theme();
  const drawer = sidebar();
  const chat = new Chat(await openStorage());
  const models = new Models();
  const use = async (model) => {
    kept.set("model", model);
    await chat.change(chat.conversation.id, { model });
    composer.focus();
  };
  const picker = new Picker(chat, models, use);
  const waiting = (node) => (models.isLoaded(node.model) ? "Reading" : `Loading ${node.model}`);
  const thread = new Thread(chat, { models: () => picker.open(), waiting, suggest: (text) => composer.set(text) });
  const send = (text, files) => {
    if (!chat.conversation.model) {
      picker.open();
      return false;
    }
    chat.send(text, files);
    thread.follow.toEnd();
    return true;
  };
  let meter = null;
  const composer = new Composer(chat, { send, changed: () => meter?.soon() });
  meter = new Meter(chat, models, composer);
  const settings = new Settings(chat, models);
  const data = new Data(chat);
  const list = new List(chat, (id) => data.one(id));
  const newChat = () => {
    chat.start();
    drawer.closeOnPhone();
    composer.focus();
  };
  $("new-chat").addEventListener("click", newChat);
  $("new-chat-bar").addEventListener("click", newChat);
  chat.addEventListener("unsaved", ({ detail }) => banner(`This conversation could not be kept: ${detail.message}.`));
  for (const type of ["open", "settings"]) chat.addEventListener(type, () => showModel(chat, models, picker));
  models.addEventListener("change", () => showModel(chat, models, picker));
  chat.addEventListener("node", async ({ detail }) => {
    if (detail.ended && detail.node.status !== "failed") await models.refreshLoaded();
    meter.soon();
  });
  const search = () => {
    drawer.open();
    $("search").focus();
  };
  const stop = () => (chat.run === undefined ? false : chat.stop());
  shortcuts({
    newChat,
    search,
    stop,
    editLast: () => thread.editLast(),
    focus: () => composer.focus(),
    models: () => picker.open(),
    settings: () => settings.open(),
  });
  await address(chat, drawer);
  await begin(chat, models);
  list.soon();
  if (!NARROW.matches) composer.focus();
}

/** What models there are, and what the one of this conversation is. */
async function begin(chat, models) {
  try {
    await models.refresh();
    const { model } = chat.conversation;
    if (models.isHere(model)) await models.describe(model);
  } catch (error) {
    banner(error.message);
  }
}

start();
