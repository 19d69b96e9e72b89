/**
 * Conversations in IndexedDB, one record each. Several tabs may write: a save merges with what is stored in one transaction, and
 * tells the other tabs. What is left out: giving old conversations up when the browser's space is full; the error says so.
 */

import { find, merge, summary } from "./conversation.js";

const NAME = "qwen2";
const VERSION = 1;
const STORE = "conversations";

/** An IndexedDB request, or a transaction, as a promise. */
function settled(request) {
  return new Promise((resolve, reject) => {
    const failed = () => reject(new Error(reason(request.error)));
    if (request instanceof IDBTransaction) {
      request.oncomplete = () => resolve();
      request.onabort = failed;
    } else {
      request.onsuccess = () => resolve(request.result);
    }
    request.onerror = failed;
  });
}

function reason(error) {
  return error?.name === "QuotaExceededError"
    ? "the space that the browser gives this page is full"
    : (error?.message ?? "the browser refused");
}

export class Storage {
  /** Opens the database; an Error says why that cannot be. */
  static async open() {
    if (!("indexedDB" in globalThis)) throw new Error("this browser has no IndexedDB");
    const opening = indexedDB.open(NAME, VERSION);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
    return new Storage(await settled(opening));
  }

  constructor(database) {
    this.database = database;
    this.index = null; // id to what the list shows, when it was read once
    this.channel = new BroadcastChannel("qwen2-conversations");
    database.onversionchange = () => database.close(); // a newer page in another tab wants it
  }

  /** Called with { kind: "saved" | "removed", id } when another tab has changed a conversation. */
  onChange(heard) {
    this.channel.onmessage = async ({ data }) => {
      const record = data.kind === "saved" ? await this.get(data.id) : undefined;
      if (record === undefined) this.index?.delete(data.id);
      else this.#noted(record);
      heard(data);
    };
  }

  /** What the list shows, of all. The first time every record passes, one by one, so that memory does not hold every text. */
  async summaries() {
    if (this.index === null) {
      const found = new Map();
      await this.each((record) => void found.set(record.id, summary(record)));
      this.index = found;
    }
    return [...this.index.values()];
  }

  #noted(record) {
    this.index?.set(record.id, summary(record));
  }

  async get(id) {
    return settled(this.database.transaction(STORE).objectStore(STORE).get(id));
  }

  /** Keep a conversation; gives back what is stored then: other tabs' messages are in it too. */
  async save(conversation) {
    const transaction = this.database.transaction(STORE, "readwrite");
    const store = transaction.objectStore(STORE);
    const stored = await settled(store.get(conversation.id));
    const merged = stored === undefined ? conversation : merge(stored, conversation);
    store.put(merged);
    await settled(transaction);
    this.#noted(merged);
    this.channel.postMessage({ kind: "saved", id: conversation.id });
    return merged;
  }

  async remove(id) {
    const transaction = this.database.transaction(STORE, "readwrite");
    transaction.objectStore(STORE).delete(id);
    await settled(transaction);
    this.index?.delete(id);
    this.channel.postMessage({ kind: "removed", id });
  }

  /** Several at once, all or none. */
  async addAll(conversations) {
    const transaction = this.database.transaction(STORE, "readwrite");
    for (const conversation of conversations) transaction.objectStore(STORE).add(conversation);
    await settled(transaction);
    for (const conversation of conversations) {
      this.#noted(conversation);
      this.channel.postMessage({ kind: "saved", id: conversation.id });
    }
  }

  async all() {
    return settled(this.database.transaction(STORE).objectStore(STORE).getAll());
  }

  /** Where a text is found: id to a few words around it. `signal` ends the search. */
  async search(text, signal) {
    const wanted = text.trim().toLowerCase();
    const found = new Map();
    await this.each((record) => {
      const where = find(record, wanted);
      if (where !== null) found.set(record.id, where);
      return signal.aborted;
    });
    return found;
  }

  /** Every record in turn, until `work` gives true. */
  each(work) {
    return new Promise((resolve, reject) => {
      const request = this.database.transaction(STORE).objectStore(STORE).openCursor();
      request.onerror = () => reject(new Error(reason(request.error)));
      request.onsuccess = () => {
        const cursor = request.result;
        if (cursor === null || work(cursor.value) === true) resolve();
        else cursor.continue();
      };
    });
  }
}
