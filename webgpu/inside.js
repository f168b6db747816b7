// Looking inside a model: lenses, attention maps, ablation and patching, as tuned_lens.py, attention_maps.py and patching.py
// compute them.

import { blank, skips } from "./depth.js";  // mod
import { differenceOfMaps } from "./diff.js";  // diff
import { UserError } from "./errors.js";
import { megabytes, Plan } from "./gpu.js";
import { readHeader, readTensor, toFloat32 } from "./safetensors.js";
import { mapOfSinks } from "./sinks.js";  // sinks

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
    ...model.gpu.matrix({ rows, width: C }, { buffer: matrices.subarray(layer * rows * C, (layer + 1) * rows * C) }, (array) => model.own(array)),
    bias: model.own(biases.subarray(layer * rows, (layer + 1) * rows)) } }));
}

/** The hash of a checkpoint's weights, as base_fingerprint of lora.py: a sidecar file stores that of its model. */
export async function fingerprint(blob) {
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
 *  lenses: see loadLens; null: the logit lens. signal: stops it by throwing the signal's reason. */
export async function lens(model, ids, lenses = null, signal = null) {
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
  }, signal);
  const parts = Math.ceil(T / ROWS), row = (values) => ({
    ids: [...values.subarray(0, 5)], p: [...values.subarray(5, 10)], entropy: values[10] });
  return Array.from({ length: L + 1 }, (_, layer) => Array.from({ length: T }, (_, t) =>
    row(new Float32Array(found[layer * parts + Math.floor(t / ROWS)], 64 * (t % ROWS), 16))));
}

// ---- attention ------------------------------------------------------------------------------------------------------

/** The attention maps of a prompt: for each layer H T T weights, with queries in rows and keys in columns. A pair of heads of
 *  differential attention has one map, A1 - lambda A2. */
export async function attention(model, ids, signal = null) {
  model.checkPrompt(ids);
  const { n_layer: L, n_kv_head: KV, head_dim: D } = model.config, H = model.queries, T = ids.length;
  const most = Math.floor(Math.sqrt(Math.min(MAPS / L, model.gpu.largest / 4) / H));  // tokens
  if (T > most) {
    throw new UserError(`The ${L * H} attention maps of ${T} tokens need ${megabytes(4 * L * H * T * T)}: take a prompt of at most ` +
      `${most} tokens.`);
  }
  const found = await model.once((plan) => {
    const room = model.room(plan, T), wanted = [];
    model.read(plan, ids, (site, layer) => {
      if (site !== "heads") return;
      const map = plan.scratch(4 * H * T * T), [q, k] = model.scored(layer, room), { attn_softcap } = model.config;
      plan.add("attention_map", {}, [T, H, KV, D, model.windowOf(layer), model.scale, attn_softcap], [model.slopes, q, k, room.lse, map],
        model.gpu.threads(H * T * T));
      if (model.sinksOf(layer)) mapOfSinks(model, plan, layer, { T, at: plan.scratch(Uint32Array.of(0, T)), q, k, lse: room.lse, map });  // sinks
      if (skips(model.config, layer)) plan.add("depth_map", {}, [H, T], [room.taken, map], model.gpu.threads(H * T * T));  // mod
      wanted.push([map, 4 * H * T * T]);
      if (model.config.diff_attn) wanted[layer] = [differenceOfMaps(model, plan, layer, room, map, T), 4 * model.heads * T * T];  // diff
    }, room);
    return wanted;
  }, signal);
  return found.map((bytes) => new Float32Array(bytes));
}

// ---- interventions --------------------------------------------------------------------------------------------------

// Each cell of these figures is a pass through all layers from the one that is changed on. So a figure of a large model takes
// minutes on a slow device, and these functions are generators: after each batch of passes they yield what is known by then.

const MOST_ROWS = 1024;  // in a batch
const BATCH = 1000;      // milliseconds that a batch should take, so that other work and the Stop button need not wait longer

/** Run the prompts, with a plan that keeps their activations: {plan, states, tops}. states: for each prompt {resid, attn, mlp},
 *  each by layer a buffer (T, C), its ids, and its room after the last layer; tops: for each the results of top.wgsl with this target. The caller destroys the plan. */
async function record(model, prompts, target) {
  const { gpu } = model, plan = new Plan(gpu);
  try {
    return await gpu.guard(async () => {
      const wanted = [], states = prompts.map((ids) => {
        const size = 4 * ids.length * model.config.n_embd, room = model.room(plan, ids.length);
        const kept = { ids, room, resid: [], attn: [], mlp: [] }, x = model.read(plan, ids, (site, layer, x, width) => {
          if (!["resid", "attn", "mlp"].includes(site)) return;
          if (site !== "resid") blank(model, plan, layer, room, x, { B: 1, T: ids.length, width });  // mod
          kept[site][layer] = plan.scratch(size);
          plan.copy(x, 0, kept[site][layer], 0, size);
        }, room);
        wanted.push(answer(model, plan, x, 1, ids.length, target));
        return kept;
      });
      (await plan.ready()).run();
      return { plan, states, tops: await Promise.all(wanted.map(([buffer, size]) => gpu.read(buffer, size))) };
    });
  } catch (error) {
    plan.destroy();
    throw error;
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

/** For each layer, the last one first, the results of all cells: of each the numbers of top.wgsl. A cell is a pass of T tokens
 *  through the layers from this one on, whose input is base.resid[layer]; tapOf(layer, part, plan, room) is the tap that changes in the
 *  b-th sequence what the cell part[b] stands for. Yields {layer, found, share} after each batch; found is null until the
 *  layer is done, and share is that of the work done. */
async function* cellsOf(model, cells, target, base, tapOf) {
  const { n_layer: L, n_embd: C, vocab_size: V, tie, n_kv_head, head_dim } = model.config, T = base.ids.length, size = 4 * T * C;
  const ofHead = V * C, ofLayer = T * (model.n_parameters - (tie ? 1 : 2) * ofHead) / L;
  const cost = (layer) => (L - layer) * ofLayer + ofHead;
  const all = cells.length * Array.from({ length: L }, (_, layer) => cost(layer)).reduce((a, b) => a + b);
  let done = 0, pace = 0;  // pace: cost that is worked off in a millisecond
  for (let layer = L - 1; layer >= 0; layer--) {
    const found = [];
    while (found.length < cells.length) {
      const most = Math.max(1, Math.min(Math.floor(MOST_ROWS / T), Math.floor(model.gpu.largest / 4 / V), Math.floor(pace * BATCH / cost(layer))));
      const part = cells.slice(found.length, found.length + most), B = part.length, began = performance.now();
      const [bytes] = await model.once((plan) => {
        const at = plan.scratch(Uint32Array.of(0, T)), room = model.room(plan, B * T), x = plan.scratch(B * size);
        const tokens = plan.scratch(Uint32Array.from({ length: B * T }, (_, i) => base.ids[i % T])), carried = 4 * T * n_kv_head * head_dim;
        for (let b = 0; b < B; b++) {
          plan.copy(base.resid[layer], 0, x, b * size, size);
          for (const name of model.carried) plan.copy(base.room[name], 0, room[name], b * carried, carried);
        }
        const tap = tapOf(layer, part, plan, room);
        return [answer(model, plan, model.forward(plan, { B, T, tokens, at, tap, rooms: () => room, start: layer, stream: x }), B, T, target)];
      });
      const numbers = new Float32Array(bytes);
      for (let b = 0; b < B; b++) found.push(numbers.subarray(16 * b, 16 * b + 16));
      done += B * cost(layer);
      pace = B * cost(layer) / (performance.now() - began);
      yield { layer, found: found.length === cells.length ? found : null, share: done / all };
    }
  }
}

const logP = (numbers) => numbers[11];
const best = (numbers) => numbers[0];

function checkTarget(model, target) {
  if (!(target < model.n_vocab)) throw new UserError("There is no target: type the token that should come next.");
}

/** The effect of each part of each layer on the target's log-probability after ids. Yields {whole, columns,
 *  values[n_layer][columns], share}. whole: that of the unchanged model; values: the change without the part, in nats; the row
 *  of a layer that is not done is null. how: replace the part's output by zero, by its mean over positions, or skip it. */
export async function* ablate(model, ids, target, how = "zero") {
  model.checkPrompt(ids);
  checkTarget(model, target);
  const { n_layer: L, n_embd: C } = model.config, { heads: H, head_width: D } = model, T = ids.length, { gpu } = model;
  const columns = ["attn", "mlp", "block", ...Array.from({ length: H }, (_, head) => `head ${head}`)];
  const MEAN = how === "mean" ? { MEAN: true } : {}, values = new Array(L).fill(null);
  const { plan: kept, states: [states], tops: [top] } = await record(model, [ids], target);
  const whole = logP(new Float32Array(top));
  const tapOf = (layer, part, plan, room) => (name, where, x, width) => part.forEach((column, b) => {
    const head = Number(column.match(/^head (\d+)/)?.[1]), site = column.startsWith("head") ? "heads" : column;
    const [first, last] = site === "heads" ? [head * D, head * D + D] : [0, width];
    const base = site === "block" ? states.resid[layer] : gpu.none;
    const here = site === "block" ? name === "resid" && where === layer + 1 : name === site && where === layer;
    if (!here) return;
    if (how === "mean" && site !== "block") blank(model, plan, layer, room, x, { B: part.length, T, width, mean: true });  // mod
    plan.add("ablate", { ...MEAN, ...(site === "block" && { BASE: true }) }, [b * T, T, width, first, last], [base, x],
      gpu.threads(last - first));
  });
  try {
    yield { whole, columns, values, share: 0 };
    for await (const { layer, found, share } of cellsOf(model, columns, target, states, tapOf)) {
      if (found) values[layer] = found.map((numbers) => logP(numbers) - whole);
      yield { whole, columns, values, share };
    }
  } finally {
    kept.destroy();
  }
}

/** The effect of the donor's activation in the recipient's forward pass, at each layer and position. Yields {clean, corrupt,
 *  values[n_layer][P], tops[n_layer][P], share}. values: (patched - corrupt) / (clean - corrupt) of the target's
 *  log-probability; tops: the most probable token; the rows of a layer that is not done are null. site: resid, attn, mlp.
 *  pairs: a position in the donor and one in the recipient, [[i, j], ...]; without pairs both prompts must have the same
 *  length. */
export async function* swap(model, donor, recipient, target, site = "resid", pairs = null) {
  [donor, recipient].forEach((ids) => model.checkPrompt(ids));
  checkTarget(model, target);
  if (!pairs && donor.length !== recipient.length) {
    throw new UserError(`The prompts have ${donor.length} and ${recipient.length} tokens: make them equally long, or say which ` +
      "position of the donor goes to which of the recipient, as in 4:5, 6:7.");
  }
  const places = pairs ?? Array.from(recipient, (_, i) => [i, i]);
  const off = places.find(([i, j]) => !(i >= 0 && i < donor.length && j >= 0 && j < recipient.length));
  if (off) throw new UserError(`${off.join(":")} are not positions, which count from 0, in prompts of ${donor.length} and ${recipient.length} tokens.`);
  const { n_layer: L, n_embd: C } = model.config, T = recipient.length, { gpu } = model;
  const { plan: kept, states: [theirs, own], tops: answers } = await record(model, [donor, recipient], target);
  const [clean, corrupt] = answers.map((top) => logP(new Float32Array(top))), values = new Array(L).fill(null), tops = new Array(L).fill(null);
  const tapOf = (layer, part, plan) => {
    const where = plan.scratch(Uint32Array.from([...part.map(([i]) => i), ...part.map(([, j]) => j)])), B = part.length;
    return (name, at, x) => {
      if (name === site && at === layer) plan.add("patch", {}, [B, T, C], [where, theirs[site][layer], x], gpu.threads(B * C));
    };
  };
  try {
    if (Math.abs(clean - corrupt) < 1e-4) {
      throw new UserError("Both prompts give the target the same probability, so that patching can have no effect: change one of them.");
    }
    yield { clean, corrupt, values, tops, share: 0 };
    for await (const { layer, found, share } of cellsOf(model, places, target, own, tapOf)) {
      if (found) values[layer] = found.map((numbers) => (logP(numbers) - corrupt) / (clean - corrupt));
      if (found) tops[layer] = found.map(best);
      yield { clean, corrupt, values, tops, share };
    }
  } finally {
    kept.destroy();
  }
}
