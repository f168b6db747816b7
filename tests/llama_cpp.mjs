// llama.cpp, as an oracle for the tests: reads a request in JSON on standard input, and writes the answer in JSON.
//
//   npm install --ignore-scripts node-llama-cpp          (in a folder of its own: LLAMA_CPP names it)
//   echo '{"model": "m.gguf", "do": "tokenize", "texts": ["a"], "special": false}' | node tests/llama_cpp.mjs
//
//   tokenize   texts, special (whether names of special tokens stand for these tokens) -> ids of each text
//   greedy     ids, n -> {ids: the n most probable tokens, one after the other, seconds: of all but the first}
//   logprobs   ids, from -> for each position, from that one on, the largest probabilities of the next token,
//              {id: probability}
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(path.join(process.env.LLAMA_CPP ?? process.cwd(), "package.json"));
const { getLlama } = await import(pathToFileURL(require.resolve("node-llama-cpp")));
let text = "";
for await (const part of process.stdin) text += part;
const request = JSON.parse(text);
const quiet = () => {};
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error", logger: quiet });
const vocabOnly = request.do === "tokenize";
const model = await llama.loadModel({ modelPath: request.model, gpuLayers: 0, vocabOnly });

const actions = {
  tokenize: () => request.texts.map((one) => model.tokenize(one, request.special ?? false)),

  async greedy() {
    const sequence = await begin(request.ids.length + request.n);
    const ids = [];
    let began;
    for await (const id of sequence.evaluate(request.ids, { temperature: 0, yieldEogToken: true })) {
      began ??= performance.now();
      ids.push(id);
      if (ids.length === request.n) break;
    }
    return { ids, seconds: (performance.now() - began) / 1000 };
  },

  async logprobs() {
    const sequence = await begin(request.ids.length + 1);
    const wanted = { generateNext: { probabilities: true } };
    const found = await sequence.controlledEvaluate(request.ids.map((id, i) => (i < (request.from ?? 0) ? id : [id, wanted])));
    return found.slice(request.from ?? 0).map(({ next }) => Object.fromEntries([...next.probabilities].slice(0, request.top ?? 20)));
  },
};

async function begin(contextSize) {
  const context = await model.createContext({ contextSize: Math.max(256, contextSize), threads: { ideal: 2, min: 1 } });
  return context.getSequence();
}

process.stdout.write(JSON.stringify(await actions[request.do]()));
await llama.dispose();
