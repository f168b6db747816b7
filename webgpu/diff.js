// ---- variant diff: differential attention (Ye et al. 2024; version 2, 2026), as in model.py ----
//
//   1: norm(A1 V - lambda A2 V) (1 - lambda_0),   lambda = exp(lq1 lk1) - exp(lq2 lk2) + lambda_0, one a layer
//   2: A1 V - sigmoid(lambda) A2 V,               lambda = W h, one a token and head
//
// A1 and A2 are the attention maps of two neighbouring query heads, of which attention computes the outputs as of any heads: O1 =
// A1 V and O2 = A2 V. Version 1 pairs the n_head heads, and joins two heads of values to one of twice the width, which only
// attention.wgsl can do. Version 2 has n_head pairs.

import { UserError } from "./errors.js";

const LAMBDAS = ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"];
const lambda0 = (layer) => 0.8 - 0.6 * Math.exp(-0.3 * layer);

export const joinsValues = ({ diff_attn, diff_attn_version }) => diff_attn && diff_attn_version === 1;

/** The numbers of query heads and of pairs, and the width of a pair's output. */
export function pairsOf(config) {
  const { n_head, head_dim } = config;
  return joinsValues(config) ? { queries: n_head, pairs: n_head / 2, width: 2 * head_dim } : { queries: 2 * n_head, pairs: n_head, width: head_dim };
}

export function checkDiff(config) {
  const { diff_attn, n_head, n_kv_head, head_dim, qk_norm_width } = config;
  if (!diff_attn) return;
  const joins = joinsValues(config);
  if (qk_norm_width || joins && (n_head % 2 || n_kv_head % 2)) {
    throw new UserError("This checkpoint has settings that make no model (diff_attn): make the checkpoint again.");
  }
  if (joins && config.sinks) {  // sinks
    throw new UserError("This checkpoint uses diff_attn and sinks, which this page cannot run together: python sample.py can.");  // sinks
  }  // sinks
  if (joins && head_dim > 128) {
    throw new UserError(`This model has heads of width ${head_dim}: with diff_attn_version=1, this page goes up to 128.`);
  }
}

/** Add the shapes of a layer's own parameters. */
export function diffShapes(config, path, shapes) {
  const { n_head, n_embd: C, head_dim: D } = config;
  if (!joinsValues(config)) return shapes.set(`${path}.lam.weight`, [n_head, C]);
  for (const name of LAMBDAS) shapes.set(`${path}.${name}`, [D]);
  shapes.set(`${path}.head_norm.weight`, [2 * D]);
}

/** The lambda of each layer of version 1, from its four vectors: floats(name, shape) reads one of them. */
export async function readLambdas(config, weights, floats, keep) {
  if (!joinsValues(config)) return;
  for (let layer = 0; layer < config.n_layer; layer++) {
    const path = `blocks.${layer}.attn`, all = [];
    for (const name of LAMBDAS) all.push(await floats(`${path}.${name}`, [config.head_dim]));
    const [first, second] = [0, 2].map((i) => Math.exp(all[i].reduce((sum, value, c) => sum + value * all[i + 1][c], 0)));
    weights.set(`${path}.lambda`, { buffer: keep(Float32Array.of(first - second + lambda0(layer))) });
  }
}

/** Buffers for R tokens, by name. pair_outputs: O1 and O2 of each pair. */
export function diffRoom(config, plan, R) {
  const { pairs, width } = pairsOf(config), sizes = { pair_outputs: 2 * pairs * width, lambda: pairs, difference: pairs * width };
  delete sizes[joinsValues(config) ? "lambda" : "difference"];
  return Object.fromEntries(Object.entries(sizes).map(([name, size]) => [name, plan.scratch(4 * R * size)]));
}

/** Add the steps from room.pair_outputs to room.o (R, pairs, width). h (R, C): the input of attention. */
export function subtractPairs(model, plan, layer, room, h, R) {
  const { gpu, config } = model, { pairs, width } = pairsOf(config), path = `blocks.${layer}.attn`, n = R * pairs * width;
  const joins = joinsValues(config), y = joins ? room.difference : room.o;
  if (!joins) model.linear(plan, `${path}.lam`, h, room.lambda, R);
  plan.add("diff", joins ? {} : { TOKENS: true }, [R, pairs, width], [lambdaOf(model, layer, room), room.pair_outputs, y], gpu.threads(n));
  if (!joins) return;
  plan.add("norm", {}, [R * pairs, width, 1e-5], [model.weights.get(`${path}.head_norm`).buffer, gpu.none, gpu.none, y, room.o], gpu.groups(R * pairs));
  model.scaled(plan, room.o, 1 - lambda0(layer), n);
}

const lambdaOf = (model, layer, room) => room.lambda ?? model.weights.get(`blocks.${layer}.attn.lambda`).buffer;

/** A1 - lambda A2 of each pair, before the norm: a buffer (pairs, T, T), from map (queries, T, T). */
export function differenceOfMaps(model, plan, layer, room, map, T) {
  const { pairs } = pairsOf(model.config), found = plan.scratch(4 * pairs * T * T), TOKENS = !joinsValues(model.config);
  plan.add("diff_map", { TOKENS }, [pairs, T], [lambdaOf(model, layer, room), map, found], model.gpu.threads(pairs * T * T));
  return found;
}

// ---- end of diff ----
