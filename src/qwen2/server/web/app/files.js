/** Text files on their way into a message: chosen, dropped, or a long text that was pasted. */

import { $, el, icon, iconButton } from "./dom.js";
import { bytes } from "./format.js";
import { announce, toast } from "./notify.js";

export const FILE_LIMIT = 512_000; // bytes of one file: more than any window of these models holds
const FILES_LIMIT = 20;
const LONG_PASTE = 6000; // characters that would bury the field

export class Files {
  /** `changed()` is called when files come or go. */
  constructor(changed) {
    this.list = [];
    this.changed = changed;
    $("attach").addEventListener("click", () => $("attach-input").click());
    $("attach-input").addEventListener("change", async ({ target }) => {
      await this.read([...target.files]);
      target.value = "";
      $("draft").focus();
    });
    this.#acceptDrops();
    $("draft").addEventListener("paste", (event) => this.#pasted(event));
  }

  /** Take these files, or say why not. */
  async read(files) {
    for (const file of files) {
      const problem = await this.#add(file);
      if (problem) toast(problem);
    }
    this.#show();
  }

  async #add(file) {
    if (this.list.length >= FILES_LIMIT) return `A message takes ${FILES_LIMIT} files at most`;
    if (file.size > FILE_LIMIT) return `${file.name} has ${bytes(file.size)}: files of up to ${bytes(FILE_LIMIT)} are read`;
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      if (text.includes("\0")) return `${file.name} is not a text file`;
      if (text.trim() === "") return `${file.name} is empty`;
      this.list.push({ name: file.name, text: text.replaceAll("\r\n", "\n") });
      announce(`${file.name} attached`);
      return null;
    } catch (error) {
      return error instanceof TypeError ? `${file.name} is not a text file in UTF-8` : `${file.name} cannot be read: ${error.message}`;
    }
  }

  /** Take all of them out. */
  take() {
    const taken = this.list;
    this.set([]);
    return taken;
  }

  set(files) {
    this.list = files;
    this.#show();
  }

  #show() {
    const chips = this.list.map((file, index) => {
      const remove = () => this.set(this.list.filter((_, other) => other !== index));
      const name = el("span", { class: "file-name", dir: "auto" }, file.name);
      const size = el("span", { class: "file-size" }, bytes(new Blob([file.text]).size));
      return el("span", { class: "chip" }, icon("text"), name, size, iconButton("close", `Remove ${file.name}`, remove));
    });
    $("files").replaceChildren(...chips);
    this.changed();
  }

  #pasted(event) {
    const { files } = event.clipboardData;
    if (files.length > 0) {
      event.preventDefault();
      this.read([...files]);
      return;
    }
    const text = event.clipboardData.getData("text/plain");
    if (text.length < LONG_PASTE) return;
    event.preventDefault();
    this.read([new File([text], `pasted-${this.list.length + 1}.txt`, { type: "text/plain" })]);
  }

  #acceptDrops() {
    const shown = (on) => {
      $("drop").hidden = !on;
    };
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      shown(true);
    });
    addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) shown(false);
    });
    addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      shown(false);
      this.read([...event.dataTransfer.files]);
    });
  }
}
