// ---- variant mod: Mixture of Depths (Raposo et al. 2024), as in model.py ----
//
//   topk: x_t + r_t (block(x)_t - x_t) for the tokens that the predictor chooses, x_t for the others,   r = w x
//   soft: x_t + sigmoid(r_t) (block(x)_t - x_t) for all
//
// Here a routed block computes all tokens, and what it computes for those that were not chosen is thrown away: on a graphics
// card the number of the chosen ones is not known when the steps are listed. So the page saves no time by it. A chosen token
// attends to chosen tokens only. Positions and the cache have a row for each token, chosen or not.

import { UserError } from "./errors.js";

export const isRouted = ({ mod, mod_every }, layer) => mod !== "none" && (layer + 1) % mod_every === 0;

/** Whether the tokens of a layer attend to chosen tokens only. */
export const skips = (config, layer) => config.mod === "topk" && isRouted(config, layer);

/** UserError for a variant of attention that depth_attention.wgsl does not have. */
export function checkDepth(config) {
  const other = [
    "sinks",  // sinks
    "diff_attn",  // diff
    "yoco",  // yoco
  ].find((name) => config[name]);
  if (config.mod === "topk" && other) {
    throw new UserError(`This checkpoint uses mod=topk and ${other}, which this page cannot run together: python sample.py can.`);
  }
}

/** Add the shapes of a routed layer's own parameters. */
export function depthShapes({ mod, n_embd: C }, path, shapes) {
  shapes.set(`${path}.depth_router.weight`, [1, C]);
  if (mod !== "topk") return;
  shapes.set(`${path}.predictor.weight`, [1, C]);
  shapes.set(`${path}.threshold`, [1]);
}

/** Buffers for a routed layer and R tokens, by name. */
export function depthRoom({ n_embd: C }, plan, R) {
  const sizes = { entered: C, depth: 1, likely: 1, depth_gate: 1, taken: 1 };
  return Object.fromEntries(Object.entries(sizes).map(([name, width]) => [name, plan.scratch(4 * R * width)]));
}

/** Before a routed block: keep its input x (R, C), and compute which tokens are chosen. The tap is called at "depth" with r. */
export function enterBlock(model, plan, layer, room, { x, R, T, at, cache, tap }) {
  const { gpu, config: { n_embd: C, mod } } = model, path = `blocks.${layer}`, SOFT = mod === "soft";
  plan.copy(x, 0, room.entered, 0, 4 * R * C);
  model.linear(plan, `${path}.depth_router`, x, room.depth, R);
  tap?.("depth", layer, room.depth, 1);
  if (!SOFT) model.linear(plan, `${path}.predictor`, x, room.likely, R);
  const threshold = SOFT ? gpu.none : model.weights.get(`${path}.threshold`).buffer;
  plan.add("depth_gate", { SOFT, CACHE: Boolean(cache) }, [R, T],
    [at, threshold, room.likely, room.depth, room.depth_gate, SOFT ? gpu.trash : cache?.taken[layer] ?? room.taken], gpu.threads(R));
}

/** After it: the residual stream, in room.mlp, from what the MLP has added and the stream before that, room.attn. */
export function leaveBlock({ gpu, config: { n_embd: C } }, plan, room, R) {
  plan.add("depth_leave", {}, [R, C], [room.entered, room.depth_gate, room.attn, room.mlp], gpu.threads(R * C));
}

/** Attention of chosen tokens to chosen tokens. of_heads: H, KV, D, window, scale and softcap. */
export function depthAttention(model, plan, layer, room, { B, T, at, q, k, v, cache, of_heads }) {
  const { config: { head_dim, n_head, block_size }, slopes } = model;
  plan.add("depth_attention", { WIDTH: head_dim }, [T, cache ? block_size : T, ...of_heads],
    [at, slopes, q, k, v, cache?.taken[layer] ?? room.taken, room.o, room.lse], [T, n_head, B]);
}

/** For a figure: make the rows of x (B T, width) of tokens that were not chosen 0, or with `mean` the mean of the others. */
export function blank({ gpu, config }, plan, layer, room, x, { B, T, width, mean = false }) {
  if (skips(config, layer)) plan.add("depth_blank", mean ? { MEAN: true } : {}, [B, T, width], [room.taken, x], gpu.threads(B * width));
}

// ---- end of mod ----
