// Real llama.cpp for tests: node llama.mjs FOLDER FILE.gguf, a JSON request a line on standard input, a JSON answer each.
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const [folder, file] = process.argv.slice(2);
const entry = pathToFileURL(`${folder}/node_modules/node-llama-cpp/dist/index.js`);
const {getLlama} = await import(entry);
const llama = await getLlama({gpu: false, logLevel: "error", build: "never", maxThreads: 1});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 1024, threads: 1, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"});
const sequence = context.getSequence();

const requests = {
    tokenize: ({texts, special}) => texts.map((text) => model.tokenize(text, special)),
    // Greedy answers to prompts of token ids, as long as they may be.
    async answer({prompts, most}) {
        const answers = [];
        for (const prompt of prompts) {
            await sequence.clearHistory();
            const answer = [];
            for await (const token of sequence.evaluate(prompt, {temperature: 0})) {
                answer.push(token);
                if (answer.length >= most || token === model.tokens.eos) break;
            }
            answers.push(answer);
        }
        return answers;
    },
    // The sum of -log p over the tokens of rows from a place on, and their number.
    async loss({rows, starts}) {
        let sum = 0, count = 0;
        for (const [at, row] of rows.entries()) {
            await sequence.clearHistory();
            const asked = row.slice(0, -1).map((token, place) =>
                place + 1 < starts[at] ? token : [token, {generateNext: {probabilities: true}}]);
            const found = await sequence.controlledEvaluate(asked);
            for (let place = starts[at] - 1; place < row.length - 1; place++, count++)
                sum -= Math.log(found[place].next.probabilities.get(row[place + 1]));
        }
        return [sum, count];
    },
    about: () => ({eos: model.tokens.eos, bos: model.tokens.bos, template: model.fileInfo.metadata.tokenizer.chat_template, metadata: model.fileInfo.metadata}),
};

for await (const line of createInterface({input: process.stdin})) {
    const request = JSON.parse(line);
    console.log(JSON.stringify(await requests[request.do](request)));
}
process.exit(0);
