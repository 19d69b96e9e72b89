/** The sampling settings as data: what they are called, their range, and what the model says of itself. */

export const SAMPLING = [
  { key: "temperature", label: "Temperature", hint: "0 always takes the likeliest token", min: 0, max: 100, step: 0.1 },
  { key: "top_p", label: "Top p", hint: "Only the likeliest, up to this share; 1 is off", min: 0.01, max: 1, step: 0.05 },
  { key: "top_k", label: "Top k", hint: "Only so many of the likeliest; 0 is off", min: 0, max: 1_000_000, step: 1, whole: true },
  { key: "min_p", label: "Min p", hint: "At least this share of the likeliest; 0 is off", min: 0, max: 1, step: 0.05 },
  { key: "repetition_penalty", label: "Repetition penalty", hint: "1 is off; above, repeating costs", min: 0.01, max: 100, step: 0.05 },
  { key: "presence_penalty", label: "Presence penalty", hint: "0 is off; above, words that were used cost", min: -2, max: 2, step: 0.1 },
  { key: "frequency_penalty", label: "Frequency penalty", hint: "0 is off; above, they cost each time", min: -2, max: 2, step: 0.1 },
  { key: "stop", label: "Stop at", hint: "Texts that end the answer, one a line; \\n is a line's end", texts: 16, characters: 1000 },
  {
    key: "seed",
    label: "Seed",
    hint: "The same seed writes the same answer",
    min: Number.MIN_SAFE_INTEGER,
    max: Number.MAX_SAFE_INTEGER,
    step: 1,
    whole: true,
  },
  { key: "max_tokens", label: "Most tokens", hint: "Of one answer", min: 1, max: 10_000_000, step: 1, whole: true },
];

/** A field's text as { value } (undefined: empty), or { error } in one line. */
export function read(setting, text) {
  if (setting.texts) return readTexts(setting, text);
  if (text.trim() === "") return { value: undefined };
  const value = Number(text.trim().replace(",", "."));
  if (!Number.isFinite(value)) return { error: "A number, or empty" };
  if (setting.whole && !Number.isInteger(value)) return { error: "A whole number" };
  if (value < setting.min || value > setting.max) return { error: `From ${setting.min} to ${setting.max}` };
  return { value };
}

const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };

function readTexts(setting, text) {
  const lines = text.split("\n").filter((line) => line !== "");
  const value = lines.map((line) => line.replace(/\\[nt\\]/g, (found) => ESCAPES[found]));
  const { error } = texts(setting, value);
  return error ? { error } : { value: value.length > 0 ? value : undefined };
}

function texts(setting, value) {
  const right = Array.isArray(value) && value.every((one) => typeof one === "string" && one !== "");
  if (!right) return { error: "A list of texts" };
  if (value.length > setting.texts) return { error: `At most ${setting.texts} of them` };
  if (value.some((one) => one.length > setting.characters)) return { error: `At most ${setting.characters} characters each` };
  return {};
}

/** A value as its field shows it. */
export function shown(setting, value) {
  if (value === undefined) return "";
  if (!setting.texts) return String(value);
  return value.map((one) => one.replace(/[\n\t\\]/g, (found) => Object.keys(ESCAPES).find((key) => ESCAPES[key] === found))).join("\n");
}

/** Sampling settings that are what they should be; an Error names the one that is not. */
export function checked(sampling) {
  const found = {};
  for (const [key, value] of Object.entries(sampling)) {
    const setting = SAMPLING.find((one) => one.key === key);
    if (setting === undefined) throw new Error(`${key} is no sampling setting`);
    const number = () => (typeof value === "number" ? read(setting, String(value)) : { error: "a number" });
    const { error } = setting.texts ? texts(setting, value) : number();
    if (error) throw new Error(`${key} is ${JSON.stringify(value)}: ${error.toLowerCase()}`);
    found[key] = value;
  }
  return found;
}

/** The model's own values, from the `parameters` of /api/show: lines of Ollama's name and a value; -1 tokens are as many as there is room for. */
export function modelDefaults(parameters) {
  const names = { repeat_penalty: "repetition_penalty", num_predict: "max_tokens" };
  const found = {};
  for (const line of (parameters ?? "").split("\n")) {
    const [, key, value] = /^(\w+)\s+(-?[\d.]+(?:e-?\d+)?)$/.exec(line.trim()) ?? [];
    if (key !== undefined && !(key === "num_predict" && Number(value) < 0)) found[names[key] ?? key] = Number(value);
  }
  return found;
}
