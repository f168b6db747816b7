// ---- variant sinks: attention sinks, as in model.py ----
//
//   sink_logits: w_ij = exp(s_ij) / (sum over keys of exp(s_ij) + exp(logit_h)): a head can attend to nothing (OpenAI 2025)
//   sinks: a query with a window sees the first S keys too, as if they were S + W - 1 back at most (Xiao et al. 2024)
//
// attention.wgsl computes o and lse, the logarithm of each softmax's sum. More keys, or a logit, can be added to both afterwards,
// so that these kernels run after any kernel of attention that computes lse, and before the heads are used.

import { UserError } from "./errors.js";

export function checkSinks({ sinks, sliding_window }) {
  if (sinks && !sliding_window) throw new UserError("This checkpoint has sinks without a window, which make no model: make the checkpoint again.");
}

/** Add the sinks of a layer with a window to o (R, H, D) and lse (R, H). */
export function attendToSinks(model, plan, layer, { R, T, at, cache, q, k, v, o, lse }) {
  const { H, uniforms, turns } = numbersOf(model, layer, R, T, cache);
  plan.add("sinks", {}, uniforms, [at, model.slopes, turns, q, k, v, o, lse], model.gpu.threads(R * H));
}

/** Put the weights of the sinks into a layer's maps (H, T, T). */
export function mapOfSinks(model, plan, layer, { T, at, q, k, lse, map }) {
  const { H, S, uniforms, turns } = numbersOf(model, layer, T, T, null);
  plan.add("sinks_map", {}, uniforms, [at, model.slopes, turns, q, k, lse, map], model.gpu.threads(H * T * S));
}

function numbersOf(model, layer, R, T, cache) {
  const { n_kv_head: KV, head_dim: D, block_size, attn_softcap } = model.config, H = model.queries, S = model.sinksOf(layer);
  const rotary = model.rotaryOf(layer), turns = rotary ? model.turnsOf(layer) : model.gpu.none;
  return { H, S, turns, uniforms: [R, T, cache ? block_size : T, H, KV, D, rotary, S, model.windowOf(layer), model.scale, attn_softcap] };
}

/** Let the logit of each head join the softmax whose results are o (R, H, width) and lse (R, H). */
export function joinSinkLogits(model, plan, path, { R, H, width, o, lse }) {
  plan.add("sink_logits", {}, [R, H, width], [model.weights.get(`${path}.sink`).buffer, o, lse], model.gpu.threads(R * H));
}

/** The gradient of the logits, after attention_backward_q.wgsl has put delta behind lse. */
export function sinkGradient(trainer, plan, path, { R, H, lse }) {
  const each = plan.spare("sink logits", 4 * R * H);
  plan.add("sink_logits_backward", {}, [R, H], [trainer.model.weights.get(`${path}.sink`).buffer, lse, each], trainer.gpu.threads(R * H));
  trainer.columnSum(plan, each, trainer.gradient(`${path}.sink.weight`), R, H);
}

// ---- end of sinks ----
