/** Numbers and times as people read them. */

const WHOLE = new Intl.NumberFormat("en");

export const count = (value) => WHOLE.format(value);

/** Bytes, in the units that file managers show. */
export function bytes(value) {
  if (value < 1000) return `${value} B`;
  const units = ["kB", "MB", "GB", "TB"];
  const power = Math.min(units.length, Math.floor(Math.log10(value) / 3));
  const scaled = value / 1000 ** power;
  return `${scaled < 10 ? scaled.toFixed(1) : Math.round(scaled)} ${units[power - 1]}`;
}

/** Seconds: 0.34 s, 4.2 s, 75 s. */
export function seconds(value) {
  return `${value < 1 ? value.toFixed(2) : value < 10 ? value.toFixed(1) : Math.round(value)} s`;
}

/** What an answer took: speed and time to the first token when it was last written on, tokens of all of it. */
export function stats(found) {
  if (!found) return [];
  const parts = [];
  if (found.newTokens > 1 && found.decodeSeconds > 0) {
    const speed = (found.newTokens - 1) / found.decodeSeconds; // the first token ends the reading of the prompt
    parts.push(`${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tok/s`);
  }
  if (found.firstSeconds !== undefined) parts.push(`${seconds(found.firstSeconds)} to first token`);
  if (found.tokens !== undefined) parts.push(`${count(found.tokens)} ${found.tokens === 1 ? "token" : "tokens"}`);
  return parts;
}

const DAY = 86_400_000;

/** The heading under which something of this time stands in the list. */
export function period(time, now = Date.now()) {
  const midnight = new Date(now).setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY) return "Yesterday";
  if (time >= midnight - 7 * DAY) return "Last 7 days";
  if (time >= midnight - 30 * DAY) return "Last 30 days";
  return "Older";
}
