// Looking inside a model: lenses, attention maps, ablation and patching, as tuned_lens.py, attention_maps.py and patching.py
// compute them.

import { UserError } from "./errors.js";
import { megabytes, Plan } from "./gpu.js";
import { readHeader, readTensor, toFloat32 } from "./safetensors.js";

const ROWS = 64;      // rows whose logits are computed at a time
const MAPS = 2 ** 28;  // numbers in all attention maps of a prompt, at most

// ---- lenses ---------------------------------------------------------------------------------------------------------

/** Load a sidecar file of tuned_lens.py for this model: for each layer {matrix, affine}. UserError if the file belongs to
 *  another model. */
export async function loadLens(model, blob) {
  const { meta, tensors } = await readHeader(blob), name = blob.name ?? "This file";
  const { n_layer: L, n_embd: C, vocab_size: V } = model.config, affine = meta?.lens === "affine";
  if (!meta?.lens) throw new UserError(`${name} holds no lenses: python tuned_lens.py trains them.`);
  if (meta.base && model.blob && meta.base !== await fingerprint(model.blob)) {
    throw new UserError(`${name} was made for another checkpoint: train lenses for this one with python tuned_lens.py.`);
  }
  const shapes = affine ? { A: [L, C, C], b: [L, C] } : { W: [L, V, C], b: [L, V] };
  const parts = [];
  for (const [part, shape] of Object.entries(shapes)) {
    const entry = tensors.get(part);
    if (entry?.shape.join() !== shape.join()) throw new UserError(`${name} was made for another checkpoint: its shapes are not those of this model.`);
    parts.push(toFloat32(await readTensor(blob, entry), entry.dtype));
  }
  const [matrices, biases] = parts, rows = affine ? C : V;
  return Array.from({ length: L }, (_, layer) => ({ affine, matrix: {
    rows, width: C, buffer: model.own(matrices.subarray(layer * rows * C, (layer + 1) * rows * C)),
    bias: model.own(biases.subarray(layer * rows, (layer + 1) * rows)) } }));
}

/** The hash of a checkpoint's weights, as base_fingerprint of lora.py: a sidecar file stores that of its model. */
async function fingerprint(blob) {
  const { tensors } = await readHeader(blob), parts = [];
  const dtypes = { F32: "float32", F16: "float16", BF16: "bfloat16", U32: "uint32", I32: "int32" };
  for (const name of [...tensors.keys()].sort()) {
    const entry = tensors.get(name), shape = entry.shape.join(", ") + (entry.shape.length === 1 ? "," : "");
    parts.push(`${name} mlx.core.${dtypes[entry.dtype]} (${shape}) `, await readTensor(blob, entry));
  }
  const digest = await crypto.subtle.digest("SHA-256", await new Blob(parts).arrayBuffer());
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Predictions from the residual stream after the embedding and each layer: rows[n_layer + 1][T] of {ids, p, entropy}, the
 *  five most probable tokens, their probabilities, and the entropy in bits. The last row is the model's own prediction.
 *  lenses: see loadLens; null: the logit lens. */
export async function lens(model, ids, lenses = null) {
  model.checkPrompt(ids);
  const { gpu } = model, T = ids.length, { n_layer: L, n_embd: C, vocab_size: V } = model.config;
  const found = await model.once((plan) => {
    const streams = Array.from({ length: L + 1 }, () => plan.scratch(4 * T * C));
    model.read(plan, ids, (site, layer, x) => { if (site === "resid") plan.copy(x, 0, streams[layer], 0, 4 * T * C); });
    const [h, moved, logits] = [C, C, V].map((width) => plan.scratch(4 * ROWS * width)), wanted = [];
    for (let layer = 0; layer <= L; layer++) {
      for (let start = 0; start < T; start += ROWS) {
        const n = Math.min(ROWS, T - start), which = plan.scratch(Uint32Array.from({ length: n }, (_, i) => start + i));
        plan.add("rows", {}, [n, C], [which, streams[layer], h], gpu.threads(n * C));
        const own = layer < L && lenses?.[layer];
        if (own && own.affine) {  // h + A h + b
          gpu.linear(plan, own.matrix, h, moved, n);
          model.add(plan, h, moved, n * C);
        }
        if (own && !own.affine) gpu.linear(plan, own.matrix, h, logits, n);
        else model.unembed(plan, h, n, logits);
        const top = plan.scratch(64 * n), targets = plan.scratch(4 * n);
        plan.add("top", {}, [n, V, model.n_vocab], [targets, logits, top], gpu.groups(n));
        wanted.push([top, 64 * n]);
      }
    }
    return wanted;
  });
  const parts = Math.ceil(T / ROWS), row = (values) => ({
    ids: [...values.subarray(0, 5)], p: [...values.subarray(5, 10)], entropy: values[10] });
  return Array.from({ length: L + 1 }, (_, layer) => Array.from({ length: T }, (_, t) =>
    row(new Float32Array(found[layer * parts + Math.floor(t / ROWS)], 64 * (t % ROWS), 16))));
}

// ---- attention ------------------------------------------------------------------------------------------------------

/** The attention maps of a prompt: for each layer H T T weights, with queries in rows and keys in columns. */
export async function attention(model, ids) {
  model.checkPrompt(ids);
  const { n_layer: L, n_head: H, n_kv_head: KV, head_dim: D } = model.config, T = ids.length;
  if (L * H * T * T > MAPS) {
    throw new UserError(`The ${L * H} attention maps of ${T} tokens need ${megabytes(4 * L * H * T * T)}: take a prompt of at most ` +
      `${Math.floor(Math.sqrt(MAPS / L / H))} tokens.`);
  }
  const found = await model.once((plan) => {
    const room = model.room(plan, T), wanted = [];
    model.read(plan, ids, (site, layer) => {
      if (site !== "heads") return;
      const map = plan.scratch(4 * H * T * T), [q, k] = model.scored(layer, room), { attn_softcap } = model.config;
      plan.add("attention_map", {}, [T, H, KV, D, model.windowOf(layer), model.scale, attn_softcap], [model.slopes, q, k, room.lse, map],
        model.gpu.threads(H * T * T));
      wanted.push([map, 4 * H * T * T]);
    }, room);
    return wanted;
  });
  return found.map((bytes) => new Float32Array(bytes));
}

// ---- interventions --------------------------------------------------------------------------------------------------

/** The result of work(states), where states are buffers with the activations (T, C) of each prompt: {resid, attn, mlp}, each
 *  by layer. */
async function recorded(model, prompts, work) {
  const plan = new Plan(model.gpu);
  try {
    const all = prompts.map((ids) => {
      const size = 4 * ids.length * model.config.n_embd, states = { resid: [], attn: [], mlp: [] };
      model.read(plan, ids, (site, layer, x) => {
        if (!(site in states)) return;
        states[site][layer] = plan.scratch(size);
        plan.copy(x, 0, states[site][layer], 0, size);
      });
      return states;
    });
    await model.gpu.guard(async () => (await plan.ready()).run());
    return await work(...all);
  } finally {
    plan.destroy();
  }
}

/** Add top.wgsl for the last position of B sequences, whose streams after the last block are x (B T, C), with one target:
 *  [buffer, bytes] of its results. */
function answer(model, plan, x, B, T, target) {
  const { n_embd: C, vocab_size: V } = model.config, { gpu } = model;
  const which = plan.scratch(Uint32Array.from({ length: B }, (_, b) => b * T + T - 1)), last = plan.scratch(4 * B * C);
  plan.add("rows", {}, [B, C], [which, x, last], gpu.threads(B * C));
  const found = plan.scratch(64 * B), targets = plan.scratch(Uint32Array.from({ length: B }, () => target));
  plan.add("top", {}, [B, V, model.n_vocab], [targets, model.unembed(plan, last, B), found], gpu.groups(B));
  return [found, 64 * B];
}

const logP = (bytes, b = 0) => new Float32Array(bytes)[16 * b + 11];
const best = (bytes, b = 0) => new Float32Array(bytes)[16 * b];

function checkTarget(model, target) {
  if (!(target < model.n_vocab)) throw new UserError("There is no target: type the token that should come next.");
}

/** The effect of each part of each layer on the target's log-probability after ids: {whole, columns,
 *  values[n_layer][columns]}. whole: that of the unchanged model; values: the change without the part, in nats. how: replace
 *  the part's output by zero, by its mean over positions, or skip it. */
export async function ablate(model, ids, target, how = "zero", onProgress = () => {}) {
  model.checkPrompt(ids);
  checkTarget(model, target);
  const { n_layer: L, n_head: H, n_embd: C, head_dim: D } = model.config, T = ids.length;
  const columns = ["attn", "mlp", "block", ...Array.from({ length: H }, (_, head) => `head ${head}`)];
  const MEAN = how === "mean" ? { MEAN: true } : {}, values = [];
  let whole = 0;
  const without = (layer, states) => model.once((plan) => {
    const at = plan.scratch(Uint32Array.of(0, T)), room = model.room(plan, T), stream = plan.scratch(4 * T * C);
    return [null, ...columns].map((column) => {
      const head = Number(column?.match(/^head (\d+)/)?.[1]), site = column?.startsWith("head") ? "heads" : column;
      const tap = (name, where, x, width) => {
        const [first, last] = site === "heads" ? [head * D, head * D + D] : [0, width];
        const base = site === "block" ? states.resid[layer] : model.gpu.none;
        const here = site === "block" ? name === "resid" && where === layer + 1 : name === site && where === layer;
        if (!here) return;
        plan.add("ablate", { ...MEAN, ...(site === "block" && { BASE: true }) }, [T, width, first, last], [base, x],
          model.gpu.threads(last - first));
      };
      plan.copy(states.resid[layer], 0, stream, 0, 4 * T * C);
      return answer(model, plan, model.forward(plan, { B: 1, T, at, tap, rooms: () => room, start: layer, stream }), 1, T, target);
    });
  });
  await recorded(model, [ids], async (states) => {
    for (let layer = 0; layer < L; layer++) {
      const found = await without(layer, states);
      whole = logP(found[0]);
      values.push(found.slice(1).map((bytes) => logP(bytes) - whole));
      onProgress((layer + 1) / L);
    }
  });
  return { whole, columns, values };
}

/** The effect of the donor's activation in the recipient's forward pass, at each layer and position: {clean, corrupt,
 *  values[n_layer][P], tops[n_layer][P]}. values: (patched - corrupt) / (clean - corrupt) of the target's log-probability;
 *  tops: the most probable token. site: resid, attn, mlp. pairs: a position in the donor and one in the recipient, [[i, j],
 *  ...]; without pairs both prompts must have the same length. */
export async function swap(model, donor, recipient, target, site = "resid", onProgress = () => {}, pairs = null) {
  [donor, recipient].forEach((ids) => model.checkPrompt(ids));
  checkTarget(model, target);
  if (!pairs && donor.length !== recipient.length) {
    throw new UserError(`The prompts have ${donor.length} and ${recipient.length} tokens: make them equally long, or say which ` +
      "position of the donor goes to which of the recipient, as in 4:5, 6:7.");
  }
  const places = pairs ?? Array.from(recipient, (_, i) => [i, i]);
  const off = places.find(([i, j]) => !(i >= 0 && i < donor.length && j >= 0 && j < recipient.length));
  if (off) throw new UserError(`${off.join(":")} are not positions, which count from 0, in prompts of ${donor.length} and ${recipient.length} tokens.`);
  const { n_layer: L, n_embd: C } = model.config, T = recipient.length, size = 4 * T * C, { gpu } = model;
  const [cleanTop, corruptTop] = await model.once((plan) => [donor, recipient].map((ids) =>
    answer(model, plan, model.read(plan, ids), 1, ids.length, target)));
  const clean = logP(cleanTop), corrupt = logP(corruptTop), values = [], tops = [];
  if (Math.abs(clean - corrupt) < 1e-4) {
    throw new UserError("Both prompts give the target the same probability, so that patching can have no effect: change one of them.");
  }
  const step = Math.max(1, Math.floor(1024 / T));
  const patched = (layer, theirs, own) => model.once((plan) => {
    const wanted = [], most = Math.min(step, places.length), room = model.room(plan, most * T), stream = plan.scratch(most * size);
    for (let first = 0; first < places.length; first += step) {
      const part = places.slice(first, first + step), B = part.length;
      for (let b = 0; b < B; b++) plan.copy(own.resid[layer], 0, stream, b * size, size);
      const where = plan.scratch(Uint32Array.from([...part.map(([i]) => i), ...part.map(([, j]) => j)]));
      const tap = (name, at, x) => {
        if (name === site && at === layer) plan.add("patch", {}, [B, T, C], [where, theirs[site][layer], x], gpu.threads(B * C));
      };
      const at = plan.scratch(Uint32Array.of(0, T));
      wanted.push(answer(model, plan, model.forward(plan, { B, T, at, tap, rooms: () => room, start: layer, stream }), B, T, target));
    }
    return wanted;
  });
  await recorded(model, [donor, recipient], async (theirs, own) => {
    for (let layer = 0; layer < L; layer++) {
      const found = await patched(layer, theirs, own);
      const cells = found.flatMap((bytes) => Array.from({ length: bytes.byteLength / 64 }, (_, b) => [logP(bytes, b), best(bytes, b)]));
      values.push(cells.map(([value]) => (value - corrupt) / (clean - corrupt)));
      tops.push(cells.map(([, top]) => top));
      onProgress((layer + 1) / L);
    }
  });
  return { clean, corrupt, values, tops };
}
