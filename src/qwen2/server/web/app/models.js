/** What is known of models: those that are here, those in memory, those that can be downloaded, and downloads that run. */

import { api } from "./api.js";
import { modelDefaults } from "./sampling.js";

export class Models extends EventTarget {
  constructor() {
    super();
    this.here = [];
    this.memory = new Map(); // name: what /api/ps says
    this.known = [];
    this.shown = new Map(); // name: what /api/show says
    this.pulls = new Map(); // name: { controller, completed, total, status, error }
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }

  async refresh() {
    const before = new Map(this.here.map((model) => [model.name, model.modified_at]));
    [this.here, this.known] = await Promise.all([api.tags(), this.known.length > 0 ? this.known : api.known()]);
    for (const { name, modified_at: now } of this.here) {
      if (before.get(name) !== now) this.shown.delete(name); // made anew under its name
    }
    await this.refreshLoaded();
  }

  async refreshLoaded() {
    this.memory = new Map((await api.loaded()).map((model) => [model.name, model]));
    this.#changed();
  }

  isHere(name) {
    return this.here.some((model) => model.name === name);
  }

  isLoaded(name) {
    return this.memory.has(name);
  }

  /** The one to begin with where none was chosen: one in memory answers at once, and is what somebody has asked before. */
  get nearest() {
    return (this.here.find((model) => this.isLoaded(model.name)) ?? this.here[0])?.name ?? null;
  }

  /** The window in tokens, where it is known already. */
  limit(name) {
    return this.memory.get(name)?.context_length ?? this.shown.get(name)?.context;
  }

  /** What a model is: { context, parameters, quantization, licence, defaults }. */
  async describe(name) {
    if (!this.shown.has(name)) {
      const { details, model_info: info, parameters, license } = await api.show(name);
      this.shown.set(name, {
        context: info[`${info["general.architecture"]}.context_length`],
        size: details.parameter_size,
        quantization: details.quantization_level,
        licence: license,
        defaults: modelDefaults(parameters),
      });
    }
    return this.shown.get(name);
  }

  /** Those that can be downloaded and are not here. */
  get absent() {
    return this.known.filter((model) => !this.isHere(model.name));
  }

  /** Download a model. Its progress and its error are in `pulls`; true when it is here then. */
  async pull(name) {
    const controller = new AbortController();
    const pull = { controller, completed: 0, total: 0, status: "Looking for it", error: null };
    this.pulls.set(name, pull);
    this.#changed();
    try {
      for await (const line of api.pull(name, controller.signal)) {
        pull.status = line.total ? null : line.status;
        if (line.total) Object.assign(pull, { completed: line.completed, total: line.total });
        this.dispatchEvent(new CustomEvent("progress", { detail: { name, pull } }));
      }
      this.#forget(name, pull);
      await this.refresh();
      await this.describe(name);
      this.#changed();
      return true;
    } catch (error) {
      if (error.name === "AbortError") this.#forget(name, pull);
      else pull.error = error.message;
      this.#changed();
      return false;
    }
  }

  /** A download has ended; one that was begun anew under its name goes on. */
  #forget(name, pull) {
    if (this.pulls.get(name) === pull) this.pulls.delete(name);
  }

  /** Take one out of memory; whether it has gone already, which it does not while it answers. */
  async unload(name) {
    await api.unload(name);
    await this.refreshLoaded();
    return !this.isLoaded(name);
  }

  /** Delete one from the server's disk. */
  async remove(name) {
    await api.remove(name);
    this.shown.delete(name);
    await this.refresh();
  }

  cancel(name) {
    this.pulls.get(name)?.controller.abort();
    this.pulls.delete(name);
    this.#changed();
  }
}
