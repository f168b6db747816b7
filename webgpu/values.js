// ---- variant resformer: value residual learning (Zhou et al. 2024), as in model.py ----
//
//   v_l = lambda_1 v_l + lambda_2 v_0      for every layer l > 0

import { UserError } from "./errors.js";

export function checkFirstValues(config) {
  if (config.value_residual && config.mod === "topk" && config.mod_every === 1) {  // the values of layer 0 would be 0 for tokens that it skips  // mod
    throw new UserError("This checkpoint uses value_residual and mod_every=1, which this page cannot run together: python sample.py can.");  // mod
  }  // mod
}

/** Mix the values v (R, KV D) of a layer with those of layer 0, of which the room keeps a copy. */
export function mixFirstValues(model, plan, path, layer, room, v, R) {
  const n = R * model.config.n_kv_head * model.config.head_dim;
  if (layer === 0) plan.copy(v.buffer ?? v, v.offset ?? 0, room.first_values, 0, 4 * n);
  else plan.add("value_mix", {}, [n], [model.weights.get(`${path}.value_mix`).buffer, room.first_values, v], model.gpu.threads(n));
}

// ---- end of resformer ----
