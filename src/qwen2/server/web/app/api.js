/**
 * The server: requests, streams, and its errors in words. A server that wants a key is asked again with the one that `askKey`
 * gives; the key lives in sessionStorage, so that it ends with the tab.
 */

const KEY = "api-key";

export class ServerError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let askKey = async () => null;

/** `ask(wasWrong)` gives a key, or null where nobody wants to give one. */
export function onKeyWanted(ask) {
  let asking = null; // one dialog, however many requests wait for it
  askKey = (wasWrong) => {
    asking ??= ask(wasWrong).finally(() => {
      asking = null;
    });
    return asking;
  };
}

async function request(path, { body, signal, method = body === undefined ? "GET" : "POST" } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = {
      ...(body === undefined ? {} : { "Content-Type": "application/json" }),
      ...(key ? { Authorization: `Bearer ${key}` } : {}),
    };
    const response = await reached(path, { method, headers, body: JSON.stringify(body), signal });
    if (response.ok) return response;
    const error = await refusal(response);
    if (response.status !== 401) throw error;
    if (sessionStorage.getItem(KEY) !== key) continue; // another request has been given a key meanwhile
    const given = await askKey(key !== null);
    if (given === null) throw error;
    sessionStorage.setItem(KEY, given);
  }
}

async function reached(path, options) {
  try {
    return await fetch(path, { ...options, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError("The server does not answer. Is qwen2 serve still running?");
  }
}

async function refusal(response) {
  const text = await response.text();
  let said;
  try {
    said = JSON.parse(text).error;
  } catch {
    said = undefined; // not ours: a proxy in between
  }
  if (typeof said === "string") return new ServerError(said, response.status);
  if (said?.message) return new ServerError(said.message, response.status, said.code);
  return new ServerError(`The server answered ${response.status} ${response.statusText}`.trim(), response.status);
}

/** Lines of a body as they come. */
async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError("The connection to the server broke off.");
  } finally {
    reader.releaseLock();
  }
  if (rest) yield rest;
}

/** Objects of a stream of server-sent events; it has to end with [DONE]. */
async function* events(response) {
  for await (const line of lines(response)) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const value = JSON.parse(data);
    if (value.error) throw new ServerError(value.error.message, 0, value.error.code);
    yield value;
  }
  throw new ServerError("The connection ended before the answer did.");
}

const json = async (path, options) => (await request(path, options)).json();

export const api = {
  /** The models that are here. */
  tags: async () => (await json("/api/tags")).models,

  /** Those in memory. */
  loaded: async () => (await json("/api/ps")).models,

  /** What a model is. */
  show: (model) => json("/api/show", { body: { model } }),

  /** Take one out of memory, when nobody uses it any more. */
  unload: (model) => json("/api/generate", { body: { model, keep_alive: 0, stream: false } }),

  /** Delete one from the server's disk. */
  remove: (model) => request("/api/delete", { body: { model }, method: "DELETE" }),

  /** What can be downloaded. */
  known: () => json("/web/models.json"),

  /** How many tokens the messages, or a text, are, and how many there may be. */
  tokenize: (body, signal) => json("/tokenize", { body, signal }),

  /** Pieces of an answer: objects of /v1/chat/completions. */
  async *chat(body, signal) {
    yield* events(await request("/v1/chat/completions", { body: streamed(body), signal }));
  },

  /** The same of /v1/completions, which goes on from ids. */
  async *completion(body, signal) {
    yield* events(await request("/v1/completions", { body: streamed(body), signal }));
  },

  /** Fetch a model; progress as it comes. */
  async *pull(model, signal) {
    for await (const line of lines(await request("/api/pull", { body: { model }, signal }))) {
      const value = JSON.parse(line);
      if (value.error) throw new ServerError(value.error);
      yield value;
    }
  },
};

const streamed = (body) => ({ ...body, stream: true, stream_options: { include_usage: true } });
