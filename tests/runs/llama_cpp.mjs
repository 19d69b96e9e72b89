// node llama_cpp.mjs MODEL.gguf TEXT COUNT: llama.cpp's ids of a text (control tokens understood), and of what it greedily writes behind it.
import {getLlama} from "node-llama-cpp";

const [file, text, count] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, maxThreads: 1});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 512});
const prompt = model.tokenize(text, true), ids = [];
for await (const token of context.getSequence().evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    ids.push(token);
    if (ids.length === Number(count)) break;
}
console.log(JSON.stringify({prompt, ids}));
process.exit(0);
