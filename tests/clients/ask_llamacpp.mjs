// Run by node: what llama.cpp (through node-llama-cpp) computes from GGUF files.
//
// ask_llamacpp.mjs MODULES OUT: MODULES is the folder that holds node_modules; OUT/job.json lists {"file", "tokens",
// "text", "generate"}. Writes for the n-th file OUT/<n>.json (the text's tokens, those that follow by greedy choice and
// their text, what the header says) and OUT/<n>.f32 (logits [tokens, vocabulary], float32), or OUT/<n>.error.

import {readFileSync, writeFileSync} from "node:fs";
import {createRequire} from "node:module";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [modules, out] = process.argv.slice(2);
const entry = createRequire(path.join(modules, "package.json")).resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(entry).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});

async function ask({file, tokens, text, generate}) {
    const model = await llama.loadModel({modelPath: file, gpuLayers: 0});
    const context = await model.createContext({contextSize: 128 + generate, sequences: 2, threads: 1});
    const sequence = context.getSequence();
    const input = tokens.map((token) => [token, {generateNext: {logits: true}}]);
    const answers = await sequence.controlledEvaluate(input);
    const size = model.fileInfo.metadata.tokenizer.ggml.tokens.length;
    const logits = new Float32Array(tokens.length * size);
    for (const [i, answer] of answers.entries())
        for (const [token, logit] of answer.next.logits) logits[i * size + token] = logit;
    sequence.dispose();
    const other = context.getSequence();
    const prompt = model.tokenize(text, false);
    const begin = model.tokens.shouldPrependBosToken ? [model.tokens.bos, ...prompt] : prompt;
    const made = [];
    for await (const token of other.evaluate(begin, {temperature: 0})) {
        made.push(token);
        if (made.length === generate) break;
    }
    const answer = {
        size,
        prompt: [...begin],
        made,
        text: model.detokenize(made),
        special: {bos: model.tokens.bos, eos: model.tokens.eos},
        type: model.fileInfo.metadata.tokenizer.ggml.pre
    };
    await context.dispose();
    await model.dispose();
    return [answer, logits];
}

for (const [n, job] of JSON.parse(readFileSync(path.join(out, "job.json"), "utf8")).entries()) {
    try {
        const [answer, logits] = await ask(job);
        writeFileSync(path.join(out, `${n}.json`), JSON.stringify(answer));
        writeFileSync(path.join(out, `${n}.f32`), logits);
    } catch (error) {
        writeFileSync(path.join(out, `${n}.error`), String(error?.stack ?? error));
    }
}
process.exit(0);
