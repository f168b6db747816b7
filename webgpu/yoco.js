// ---- variant yoco: You Only Cache Once (Sun et al. 2024), as in model.py ----
//
//   blocks 0 ... L/2 - 1 attend in windows;   K, V = keys and values of norm(x), once;   blocks L/2 ... L - 1 have queries only,
//   all to K and V
//
// In a room, K and V are the keys and values that no later block replaces. Of the cache, the layer L/2 holds them, and later layers
// have none. For a part of a prompt after which no token is drawn, the second half of the blocks has nothing to do.

import { UserError } from "./errors.js";

/** The first layer of the second half. */
export const halfOf = ({ n_layer }) => Math.floor(n_layer / 2);

/** Whether the queries of a layer attend to the shared keys and values. */
export const crosses = (config, layer) => config.yoco && layer >= halfOf(config);

export function checkYoco(config) {
  if (!config.yoco) return;
  if (config.n_layer < 2 || config.rope_pattern.includes("N")) {
    throw new UserError("This checkpoint has settings that make no model (yoco): make the checkpoint again.");
  }
  config.sliding_window ||= Math.max(1, Math.floor(config.block_size / 4));
}

/** Add the steps from the stream x (R, C) before the layer L/2 to the shared keys and values. */
export function shareKeysValues(model, plan, room, { x, R, ...more }) {
  model.norm(plan, "shared.norm", x, room.h, R, model.config.n_embd);
  model.keysValues(plan, "shared", halfOf(model.config), room, { h: room.h, R, ...more });
}

/** The buffers of the shared keys and values. */
export function sharedKeysValues(model, room, cache) {
  const half = halfOf(model.config);
  return cache ? [cache.k[half], cache.v[half]] : [model.scored(half, room)[1], room.v];
}

/** Of a room, the buffers of the shared keys and values, by name. */
export const sharedNames = ({ pos, qk_norm }) => [pos === "rope" ? "kr" : qk_norm ? "kn" : "k", "v"];

// ---- end of yoco ----
