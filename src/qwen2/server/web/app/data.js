/** The dialog of export and import. */

import { $, download } from "./dom.js";
import { count } from "./format.js";
import { toast } from "./notify.js";
import { exportJson, exportMarkdown, fileName, importJson } from "./transfer.js";

export class Data {
  constructor(chat) {
    this.chat = chat;
    $("open-data").addEventListener("click", () => this.open());
    $("export-all").addEventListener("click", async () => {
      const all = await chat.storage.all();
      download(`qwen2-conversations-${new Date().toISOString().slice(0, 10)}.json`, exportJson(all), "application/json");
      this.#say(`${plural(all.length)} exported`);
    });
    $("export-one").addEventListener("click", () => this.one(chat.conversation.id));
    $("export-markdown").addEventListener("click", () => {
      const { conversation } = chat;
      download(fileName(conversation.title, "md"), exportMarkdown(conversation), "text/markdown");
      this.#say("Exported");
    });
    $("import").addEventListener("click", () => $("import-input").click());
    $("import-input").addEventListener("change", async ({ target }) => {
      const [file] = target.files;
      if (file !== undefined) await this.#import(file);
      target.value = "";
    });
  }

  open() {
    this.#say("");
    const { isNew, storage } = this.chat;
    for (const id of ["export-one", "export-markdown"]) $(id).disabled = isNew;
    for (const id of ["export-all", "import"]) $(id).disabled = storage === null;
    $("data").showModal();
  }

  /** Export one conversation. */
  async one(id) {
    const { chat } = this;
    const conversation = id === chat.conversation.id ? chat.conversation : await chat.storage.get(id);
    download(fileName(conversation.title, "json"), exportJson([conversation]), "application/json");
    this.#say("Exported");
  }

  async #import(file) {
    try {
      const found = importJson(await file.text());
      await this.chat.storage.addAll(found);
      this.chat.emit("list");
      this.#say(`${plural(found.length)} imported`);
      if (found.length === 1) await this.chat.open(found[0].id);
    } catch (error) {
      this.#say(error.message, true);
    }
  }

  #say(text, bad = false) {
    $("data-note").textContent = text;
    $("data-note").classList.toggle("bad", bad);
    if (text && !$("data").open) toast(text);
  }
}

const plural = (number) => `${count(number)} ${number === 1 ? "conversation" : "conversations"}`;
