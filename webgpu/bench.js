// Measures the speed of this device: of a matmul, and of the model when it writes, reads and learns.
//
//   const { text } = await benchmark(gpu, model, (line) => console.log(line));

import { Plan } from "./gpu.js";
import { Trainer, windowOf } from "./train.js";

/** Milliseconds that work() takes: the median of some rounds, after a first one that is not counted. */
async function median(work, rounds = 5) {
  const times = [];
  for (let round = 0; round <= rounds; round++) {
    const began = performance.now();
    await work();
    times.push(performance.now() - began);
  }
  return times.slice(1).sort((a, b) => a - b)[Math.floor(rounds / 2)];
}

/** GFLOP/s of y = x W^T, all three n x n, as training multiplies. */
export async function matmul(gpu, n) {
  const plan = new Plan(gpu), [x, W, y] = [0, 0, 0].map(() => plan.scratch(4 * n * n));
  const times = Math.max(1, Math.min(64, Math.round(2e9 / (2 * n ** 3))));
  for (let i = 0; i < times; i++) gpu.linear(plan, { buffer: W, rows: n, width: n }, x, y, n, { ACCUMULATE: false });
  await plan.ready();
  const time = await median(() => {
    plan.run();
    return gpu.device.queue.onSubmittedWorkDone();
  });
  plan.destroy();
  return times * 2 * n ** 3 / time / 1e6;
}

/** Tokens a second, {decode, prefill}: written one by one after a short prompt, and read in a long prompt. */
export async function generation(model, new_tokens = 32) {
  const write = async (ids, n) => {
    for await (const _ of model.generate(ids, { max_new_tokens: n, temperature: 0 }));
  };
  const long = new Array(Math.min(512, model.config.block_size) - 1).fill(1), short = [1];
  const decode = await median(() => write(short, new_tokens), 3);
  const prefill = await median(() => write(long, 1), 3);
  return { decode: 1000 * new_tokens / decode, prefill: 1000 * long.length / prefill };
}

/** Tokens a second in training, with batches of four windows. */
export async function training(gpu, model) {
  const T = windowOf(model.config), ids = Array.from({ length: 20 * T }, (_, i) => i % Math.min(97, model.n_vocab));
  const trainer = await Trainer.create(gpu, { model, ids, batch_size: 4 });
  try {
    return 1000 * 4 * T / await median(() => trainer.step(), gpu.info.fallback ? 1 : 3);
  } finally {
    trainer.destroy();
  }
}

/** All measurements, as {text}; onLine(line) is called for each line as soon as it is measured. */
export async function benchmark(gpu, model, onLine = () => {}) {
  const lines = [], say = (line) => {
    lines.push(line);
    onLine(line);
  };
  const n = gpu.info.fallback ? 256 : 2048;
  say(`${gpu.info.name}${gpu.info.fallback ? " (software)" : ""}; ${gpu.choices.filter(({ used }) => used).map(({ name }) => name).join(", ")}`);
  say(`matmul ${n} x ${n} x ${n}: ${(await matmul(gpu, n)).toFixed(1)} GFLOP/s`);
  say(`model: ${(model.n_parameters / 1e6).toFixed(2)}M parameters, ${model.format}, ${model.config.n_layer} layers, width ${model.config.n_embd}`);
  const { decode, prefill } = await generation(model);
  say(`writing: ${decode.toFixed(0)} tokens/s`);
  say(`reading: ${prefill.toFixed(0)} tokens/s`);
  say(`learning: ${(await training(gpu, model)).toFixed(0)} tokens/s`);
  return { text: lines.join("\n") };
}
