// The JavaScript clients of Ollama and OpenAI: node --test, with the server's URL and the model in the environment.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Ollama } from "ollama";
import OpenAI from "openai";

const url = process.env.SERVER_URL;
const model = process.env.SERVER_MODEL;
const question = "What is the capital of France? Answer with one word.";
const count = "Count from 1 to 10, separated by spaces.";
const numbers = "1 2 3 4 5 6 7 8 9 10";
const call =
  'What is the weather in Paris? Answer in this form:\n<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>';
const person = "Anna is 31 years old. Write her name and her age as JSON.";
const schema = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city now.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];
const user = (content) => [{ role: "user", content }];
const length = (vector) => Math.sqrt(vector.reduce((sum, x) => sum + x * x, 0));

const ollama = new Ollama({ host: url });
const options = { temperature: 0, num_predict: 60 };

test("ollama (js): chat", async () => {
  const answer = await ollama.chat({ model, messages: user(question), options });
  assert.match(answer.message.content, /Paris/);
  assert.equal(answer.done_reason, "stop");
  assert.ok(answer.eval_count > 0 && answer.prompt_eval_count > 0);
});

test("ollama (js): stream", async () => {
  let text = "", pieces = 0;
  for await (const piece of await ollama.chat({ model, messages: user(count), options, stream: true })) {
    text += piece.message.content;
    pieces += 1;
  }
  assert.equal(text.trim(), numbers);
  assert.ok(pieces > 5);
});

test("ollama (js): a stream that is aborted", async () => {
  const stream = await ollama.chat({ model, messages: user("Count from 1 to 1000."), options: { temperature: 0 }, stream: true });
  await assert.rejects(async () => {
    let pieces = 0;
    for await (const _ of stream) if (++pieces === 5) stream.abort();
  }, { name: "AbortError" });
});

test("ollama (js): generate, and going on with its context", async () => {
  const first = await ollama.generate({ model, prompt: "My name is Anna.", options });
  const second = await ollama.generate({ model, prompt: "What is my name?", context: first.context, options });
  assert.match(second.response, /Anna/);
});

test("ollama (js): fill in the middle", async () => {
  const answer = await ollama.generate({ model, prompt: "def add(a, b):\n    return ", suffix: "\n\nprint(add(1, 2))\n", options });
  assert.match(answer.response, /a \+ b/);
});

test("ollama (js): tools", async () => {
  const answer = await ollama.chat({ model, messages: user(call), tools, options });
  assert.deepEqual(answer.message.tool_calls.map((one) => one.function), [{ name: "get_weather", arguments: { city: "Paris" } }]);
  const told = await ollama.chat({
    model,
    messages: [
      ...user("What is the weather in Paris?"),
      answer.message,
      { role: "tool", tool_name: "get_weather", content: "17 degrees, light rain" },
      ...user("Tell me that in one sentence."),
    ],
    options,
  });
  assert.match(told.message.content, /17/);
});

test("ollama (js): structured output", async () => {
  const answer = await ollama.chat({ model, messages: user(person), format: schema, options });
  assert.deepEqual(JSON.parse(answer.message.content), { name: "Anna", age: 31 });
});

test("ollama (js): embeddings", async () => {
  const { embeddings } = await ollama.embed({ model, input: ["a cat", "interest rates"], truncate: true });
  assert.equal(embeddings.length, 2);
  for (const vector of embeddings) assert.ok(Math.abs(length(vector) - 1) < 1e-3);
});

test("ollama (js): list, show, ps, version", async () => {
  assert.ok((await ollama.list()).models.some((one) => one.name === model));
  assert.ok((await ollama.show({ model })).capabilities.includes("completion"));
  assert.deepEqual((await ollama.ps()).models.map((one) => one.name), [model]);
  assert.ok((await ollama.version()).version);
});

test("ollama (js): pull of a model that is here, copy, delete", async () => {
  assert.equal((await ollama.pull({ model })).status, "success");
  await ollama.copy({ source: model, destination: "mine:copy" });
  assert.ok((await ollama.list()).models.some((one) => one.name === "mine:copy"));
  assert.equal((await ollama.delete({ model: "mine:copy" })).status, "success");
  assert.ok(!(await ollama.list()).models.some((one) => one.name === "mine:copy"));
});

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const plain = { model, temperature: 0, max_tokens: 60 };

test("openai (js): chat", async () => {
  const answer = await openai.chat.completions.create({ ...plain, messages: user(question) });
  assert.match(answer.choices[0].message.content, /Paris/);
});

test("openai (js): stream", async () => {
  const stream = openai.chat.completions.stream({ ...plain, messages: user(count), stream_options: { include_usage: true } });
  assert.equal((await stream.finalContent()).trim(), numbers);
  assert.ok((await stream.totalUsage()).completion_tokens > 10);
});

test("openai (js): tools", async () => {
  const answer = await openai.chat.completions.create({ ...plain, messages: user(call), tools });
  const [one] = answer.choices[0].message.tool_calls;
  assert.deepEqual([one.function.name, JSON.parse(one.function.arguments)], ["get_weather", { city: "Paris" }]);
});

test("openai (js): tools, a required one", async () => {
  const answer = await openai.chat.completions.create({ ...plain, messages: user("Weather in Paris?"), tools, tool_choice: "required" });
  const [one] = answer.choices[0].message.tool_calls;
  assert.deepEqual([one.function.name, JSON.parse(one.function.arguments)], ["get_weather", { city: "Paris" }]);
});

test("openai (js): structured output", async () => {
  const answer = await openai.chat.completions.parse({
    ...plain,
    messages: user(person),
    response_format: { type: "json_schema", json_schema: { name: "person", schema, strict: true } },
  });
  assert.deepEqual(answer.choices[0].message.parsed, { name: "Anna", age: 31 });
});

test("openai (js): embeddings", async () => {
  const { data } = await openai.embeddings.create({ model, input: ["a cat", "interest rates"] });
  for (const one of data) assert.ok(Math.abs(length(one.embedding) - 1) < 1e-3);
});

test("openai (js): responses, whole and streamed", async () => {
  const answer = await openai.responses.create({ model, input: question, temperature: 0, max_output_tokens: 60 });
  assert.match(answer.output_text, /Paris/);
  let text = "";
  for await (const event of await openai.responses.create({ model, input: count, temperature: 0, stream: true }))
    if (event.type === "response.output_text.delta") text += event.delta;
  assert.equal(text.trim(), numbers);
});

test("openai (js): errors are the client's own", async () => {
  await assert.rejects(openai.chat.completions.create({ model: "gpt-4o", messages: user("a") }), { status: 404 });
  await assert.rejects(openai.chat.completions.create({ ...plain, messages: user("a"), top_logprobs: 2 }), { status: 400 });
});
