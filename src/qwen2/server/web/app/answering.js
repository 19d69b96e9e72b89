/** One answer: what is asked of the server, and what of its stream goes into the message. */

import { api, ServerError } from "./api.js";
import { asMessages, pathTo } from "./conversation.js";
import { count } from "./format.js";

/**
 * Write `node`, going on from what it has. `wrote()` is called after each piece. The node's status says how it ended; errors of
 * the server are thrown, and what came before them stays.
 */
export async function write(conversation, node, signal, wrote) {
  const clock = { start: performance.now(), first: null, last: null };
  const begun = node.content !== "";
  const before = begun ? (node.stats?.tokens ?? 0) : 0;
  const asked = begun ? await continued(conversation, node, signal) : null;
  const stream = begun ? api.completion(asked, signal) : api.chat(chatBody(conversation, node), signal);
  for await (const piece of stream) {
    const choice = piece.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    if (text) {
      clock.first ??= performance.now();
      clock.last = performance.now();
      node.content += text;
      wrote();
    }
    if (choice?.finish_reason) node.status = choice.finish_reason === "length" ? "length" : "done";
    if (piece.usage) node.stats = fromUsage(piece, clock, before);
  }
}

/**
 * Counts of an answer that was broken off, for which the server sends no usage: its text counted anew. `before` is the count
 * where the answer went on; the speed is that of what came since.
 */
export async function countStopped(node, clock, before) {
  if (node.content === "") return;
  const { count: tokens } = await api.tokenize({ model: node.model, prompt: node.content });
  node.stats = { ...node.stats, tokens, newTokens: Math.max(0, tokens - before), ...clock };
}

function chatBody(conversation, node) {
  return { model: node.model, messages: asMessages(conversation, pathTo(conversation, node.parent)), ...conversation.sampling };
}

/** The prompt's ids with the answer's so far behind them: the model goes on in the middle of its turn. */
async function continued(conversation, node, signal) {
  const { model } = node;
  const messages = asMessages(conversation, pathTo(conversation, node.parent));
  const prompt = await api.tokenize({ model, messages }, signal);
  const answer = await api.tokenize({ model, prompt: node.content }, signal);
  const ids = [...prompt.tokens, ...answer.tokens];
  const room = prompt.max_model_len - ids.length;
  if (room < 1) {
    throw new ServerError(
      `The conversation has ${count(ids.length)} tokens, the window is ${count(prompt.max_model_len)}: there is no room to go on.`,
    );
  }
  const most = conversation.sampling.max_tokens ?? room;
  return { model, prompt: ids, ...conversation.sampling, max_tokens: Math.min(most, room) };
}

function fromUsage({ usage, timings }, { start, first }, before) {
  return {
    tokens: before + usage.completion_tokens,
    newTokens: usage.completion_tokens,
    promptTokens: usage.prompt_tokens - before,
    cachedTokens: usage.prompt_tokens_details?.cached_tokens ?? 0,
    decodeSeconds: timings?.decode_seconds ?? 0,
    ...(first === null ? {} : { firstSeconds: (first - start) / 1000 }),
  };
}
