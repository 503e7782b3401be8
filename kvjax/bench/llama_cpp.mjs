// llama.cpp through node-llama-cpp, for llama_cpp.py: a JSON object per line in, one per line out.
// Arguments: the folder that has node_modules, a GGUF file, tokens of a context, threads, the cache's format.
import {createInterface} from "node:readline";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const [folder, file, size, threads, store] = process.argv.slice(2);
const index = join(folder, "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(index).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: file});
const options = {contextSize: +size, batchSize: 512, threads: +threads};
if (store !== "f16") Object.assign(options, {
    flashAttention: true, experimentalKvCacheKeyType: store, experimentalKvCacheValueType: store
});
const sequence = (await model.createContext(options)).getSequence();
const say = (found) => process.stdout.write(JSON.stringify(found) + "\n");
let text;

async function next(count) {
    const tokens = [], start = performance.now();
    while (tokens.length < count) tokens.push((await text.next()).value);
    say({seconds: (performance.now() - start) / 1000, tokens});
}

say({ready: process.pid});
for await (const line of createInterface({input: process.stdin})) {
    const {read, steps} = JSON.parse(line);
    if (read) {
        if (text) await text.return();
        await sequence.clearHistory();
        text = sequence.evaluate(read, {temperature: 0, yieldEogToken: true});
    }
    await next(read ? 1 : steps);
}
process.exit(0);
