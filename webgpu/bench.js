// Measures the speed of this device: of a matmul, and of the model when it writes, reads and learns.
//
//   const { text } = await benchmark(gpu, model, (line) => console.log(line));

import { configOf, GPT, parametersOf } from "./gpt.js";
import { Plan } from "./gpu.js";
import { byteTokenizer } from "./tokenizer.js";
import { Trainer, windowOf } from "./train.js";

/** Milliseconds that work() takes: the median of some rounds, after a first one that is not counted. The signal stops it
 *  between two rounds. */
async function median(work, rounds = 5, signal = null) {
  const times = [];
  for (let round = 0; round <= rounds; round++) {
    signal?.throwIfAborted();
    const began = performance.now();
    await work();
    times.push(performance.now() - began);
  }
  return times.slice(1).sort((a, b) => a - b)[Math.floor(rounds / 2)];
}

const LEAST = 50;  // milliseconds of work in a run of matmul(), of which a submission takes one to three

/** GFLOP/s of y = x W^T, all three n x n, as training multiplies. */
export async function matmul(gpu, n, signal) {
  const plan = new Plan(gpu), [x, W, y] = [0, 0, 0].map(() => plan.scratch(4 * n * n));
  gpu.linear(plan, { buffer: W, rows: n, width: n }, x, y, n, { ACCUMULATE: false });
  await plan.ready();
  let times = 1, time = 0;
  try {
    for (; time < LEAST; times *= 2) {
      time = await median(() => {
        plan.run(times);
        return gpu.device.queue.onSubmittedWorkDone();
      }, 3, signal);
    }
  } finally {
    plan.destroy();
  }
  return times / 2 * 2 * n ** 3 / time / 1e6;
}

/** Tokens a second, {decode, prefill}: written one by one after a short prompt, and read in a long prompt. */
export async function generation(model, new_tokens = 32, signal = null) {
  const write = async (ids, n) => {
    for await (const _ of model.generate(ids, { max_new_tokens: n, temperature: 0, signal }));
  };
  const long = new Array(Math.min(1024, model.config.block_size) - 1).fill(1), short = [1];
  const decode = await median(() => write(short, new_tokens), 3, signal);
  const prefill = await median(() => write(long, 1), 3, signal);
  return { decode: 1000 * new_tokens / decode, prefill: 1000 * long.length / prefill };
}

const WARM = 1000;  // milliseconds

/** Milliseconds that an update takes. On a card, the first ones take up to four times as long as all later ones: those of WARM
 *  milliseconds are not counted. */
async function update(gpu, trainer, signal = null) {
  const end = performance.now() + (gpu.info.fallback ? 0 : WARM);
  while (performance.now() < end && !signal?.aborted) await trainer.step();
  return median(() => trainer.step(), gpu.info.fallback ? 1 : 3, signal);
}

/** Tokens a second in training, with batches of four windows. */
export async function training(gpu, model, signal) {
  const T = windowOf(model.config), ids = Array.from({ length: 20 * T }, (_, i) => i % Math.min(97, model.n_vocab));
  const trainer = await Trainer.create(gpu, { model, ids, batch_size: 4 });
  try {
    return 1000 * 4 * T / await update(gpu, trainer, signal);
  } finally {
    trainer.destroy();
  }
}

/** All measurements, as {text}; onLine(line) is called for each line as soon as it is measured. The signal stops it by
 *  throwing its reason. */
export async function benchmark(gpu, model, onLine = () => {}, signal = null) {
  const lines = [], say = (line) => {
    lines.push(line);
    onLine(line);
  };
  const n = gpu.info.fallback ? 256 : 2048;
  say(`${gpu.info.name}${gpu.info.fallback ? " (software)" : ""}; ${gpu.choices.filter(({ used }) => used).map(({ name }) => name).join(", ")}`);
  say(`matmul ${n} x ${n} x ${n}: ${(await matmul(gpu, n, signal)).toFixed(1)} GFLOP/s`);
  say(`model: ${(model.n_parameters / 1e6).toFixed(2)}M parameters, ${model.format}, ${model.config.n_layer} layers, width ${model.config.n_embd}`);
  const { decode, prefill } = await generation(model, 32, signal);
  say(`writing: ${decode.toFixed(0)} tokens/s`);
  say(`reading: ${prefill.toFixed(0)} tokens/s`);
  say(`learning: ${(await training(gpu, model, signal)).toFixed(0)} tokens/s`);
  return { text: lines.join("\n") };
}

// ---- without a checkpoint, for runs/page_speed.py ---------------------------------------------------------------------

/** A model with random weights, matrices of so many bits: its speed is that of a checkpoint. */
export function randomModel(gpu, settings, bits) {
  const config = configOf(settings), weights = new Map(), made = [];
  const noise = Uint32Array.from({ length: 2 ** 16 }, () => Math.random() * 2 ** 32);
  const keep = (n, mask) => {  // n words; the mask keeps the exponents of floats small
    const words = new Uint32Array(n);
    for (let i = 0; i < n; i++) words[i] = noise[i % 65521] & mask;
    made.push(gpu.buffer(words));
    return made.at(-1);
  };
  for (const [name, shape] of parametersOf(config)) {
    const path = name.slice(0, name.lastIndexOf(".")), n = shape.reduce((a, b) => a * b), width = shape.length > 1 ? shape.at(-1) : 1, rows = n / width;
    if (name.endsWith(".bias")) weights.get(path).bias = keep(n, 0xbbffffff);
    else if (shape.length === 1 || path === "pos_embed") weights.set(path, { buffer: keep(n, 0xbbffffff), rows, width });
    else if (bits === 16) weights.set(path, { buffer: keep(n / 2, 0xa7ffa7ff), rows, width, bits });
    else {
      weights.set(path, { buffer: keep(n * bits / 32, 0xffffffff), rows, width, bits, group: 64, scaleBits: 16,
        scales: keep(n / 128, 0x87ff87ff), biases: keep(n / 128, 0x87ff87ff) });
    }
  }
  return new GPT(gpu, config, weights, { meta: {}, made });
}

/** The time of each kernel of a plan, run alone again and again: lines of [microseconds in the plan, times, name ...]. */
export async function profile(gpu, plan) {
  const kinds = new Map();
  for (const { name, settings, uniforms, buffers, groups, copy } of plan.steps) {
    if (copy) continue;
    const key = `${name} ${JSON.stringify(settings)} ${uniforms.join(" ")} in ${groups.join(" x ")}`;
    if (!kinds.has(key)) kinds.set(key, { n: 0, step: [name, settings, uniforms, buffers, groups] });
    kinds.get(key).n += 1;
  }
  const lines = [];
  for (const [key, { n, step }] of kinds) {
    let time = 0, times = 4;
    for (; time < 20 && times < 5000; times *= 4) {
      const alone = new Plan(gpu);
      for (let i = 0; i < times; i++) alone.add(...step);
      await alone.ready();
      time = await median(() => {
        alone.run();
        return gpu.device.queue.onSubmittedWorkDone();
      }, 3);
      alone.destroy();
    }
    lines.push([1000 * n * time / (times / 4), n, key]);
  }
  return lines.sort(([a], [b]) => b - a);
}

/** Measure a shape: say(line) is called for each line. only: of matmul, learn, read, write; all if it is empty. */
export async function measureShape(gpu, { config, only, profile: whole }, say) {
  const wanted = (name) => !only.length || only.includes(name);
  const table = async (plan) => {
    const lines = await profile(gpu, plan);
    await say(lines.map(([time, n, key]) => `${time.toFixed(0).padStart(9)} us  ${n} times  ${key}`).slice(0, 40).join("\n"));
    await say(`${lines.reduce((sum, [time]) => sum + time, 0).toFixed(0).padStart(9)} us  in ${plan.steps.length} steps`);
  };
  await say(`${gpu.info.name}, largest buffer ${(gpu.info.limits.binding / 2 ** 20).toFixed(0)} MiB, ${[...gpu.device.features].join(" ")}`);
  for (const { name, used, reason } of gpu.choices) await say(`${used ? "yes" : "no "} ${name}: ${reason}`);
  if (wanted("matmul")) {
    for (const n of gpu.info.fallback ? [256] : [512, 1024, 2048, 4096]) await say(`matmul ${n}: ${(await matmul(gpu, n)).toFixed(0)} GFLOP/s`);
    const { tiles } = gpu.paths;
    for (const SIDE of whole && !gpu.info.fallback ? [0, 64, 128] : []) {
      gpu.paths.tiles = [{ least: 0, SIDE }];
      await say(`matmul 4096, ${SIDE ? `tiles of ${SIDE}` : "no tiles"}: ${(await matmul(gpu, 4096)).toFixed(0)} GFLOP/s`);
    }
    gpu.paths.tiles = tiles;
  }
  if (wanted("learn")) {
    const T = config.block_size, ids = Array.from({ length: 20 * T }, (_, i) => i % 97), tokenizer = byteTokenizer();
    const trainer = await Trainer.create(gpu, { config, tokenizer, ids, batch_size: 4, max_iters: 100 });
    const time = await update(gpu, trainer);
    await say(`learning, 4 x ${T}: ${(4000 * T / time).toFixed(0)} tokens/s, ${time.toFixed(1)} ms a step`);
    if (whole) await table(trainer.plan);
    trainer.destroy();
  }
  for (const bits of wanted("read") || wanted("write") ? [16, 4] : []) {
    const model = randomModel(gpu, config, bits), kind = bits === 16 ? "float16" : `${bits} bits`;
    const { decode, prefill } = await generation(model, gpu.info.fallback ? 4 : 256);
    await say(`${kind}: writing ${decode.toFixed(0)} tokens/s, reading ${prefill.toFixed(0)}`);
    if (whole) {
      for (const { plan } of model.writer().plans.values()) await table(plan);
      const { plan } = await model.pass(1, true), { at, drawn } = model.writer(), done = () => gpu.device.queue.onSubmittedWorkDone();
      const ways = { "in one submission": () => (plan.run(64), done()), "one submission each": () => {
        for (let i = 0; i < 64; i++) plan.run();
        return done();
      }, "read one by one": async () => {
        const coming = [];
        for (let i = 0; i < 64; i++) plan.run(), coming.push(gpu.read(drawn, 4));
        await Promise.all(coming);
      } };
      for (const [name, way] of Object.entries(ways)) {
        const time = await median(() => {
          gpu.write(at, Uint32Array.of(0, 1, 0, 0));
          return way();
        }, 3);
        await say(`64 tokens ${name}: ${(1000 * time / 64).toFixed(0)} us each`);
      }
    }
    model.destroy();
  }
}
