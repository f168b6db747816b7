// One prompt's forward pass as a sum: what the embedding, each head and each MLP add to the residual stream, and which part
// of the predicted token's logit each of them gives (direct logit attribution: Elhage et al. 2021, "A Mathematical Framework
// for Transformer Circuits").

import { UserError } from "./errors.js";
import { attention, lens } from "./inside.js";

// With these settings what a layer adds is not the sum of what its heads and its MLP add.
const REFUSED = [
  "mod",  // mod
  "diff_attn",  // diff
];

/** Everything that the panel shows of ids (T,), at each position t. Heads and layers count from 0.
 *
 *  rows[L + 1][T]   the lens's predictions from each state of the stream, see lens(); maps[L]  see attention()
 *  norms[L + 1][T]  the norm of each state: embedding, after layer 0, ...
 *  embedding        {norm[T], share[T]}, and likewise mlp[L], heads[L][H]: the norm of what the part adds to the stream, and
 *                   its direct contribution to the logit of the most probable token
 *  logit[T]         of that token, before the softcap of models that have one
 *  rest[T]          what no part gives: biases of attention's output, of the final norm and of the head
 *
 *  The final norm multiplies each number of the stream by a factor that depends on all parts. For the contributions it is the
 *  factor of the whole stream, so that they sum to the logit; with LayerNorm, each part's mean is subtracted from it. Likewise
 *  where a norm stands after attention (norm_place), for its heads. UserError if the model is of another architecture.
 *  signal: stops it by throwing the signal's reason. */
export async function flow(model, ids, signal = null) {
  const other = REFUSED.find((name) => ![undefined, false, 0, "none"].includes(model.config[name]));
  if (other) {
    throw new UserError(`This panel cannot show a model with ${other}: what its layers add is not the sum of what heads and MLPs add. ` +
      "Take another model.");
  }
  const rows = await lens(model, ids, null, signal), maps = await attention(model, ids, signal);
  return { rows, maps, ...await contributions(model, ids, rows.at(-1).map(({ ids: [best] }) => best), signal) };
}

/** norms, embedding, heads, mlp, logit and rest of flow(), for the logits of one target at each position. */
async function contributions(model, ids, targets, signal) {
  const { gpu, config } = model, { n_layer: L, n_head: H, n_embd: C, norm, norm_eps, norm_place, logit_scale } = config;
  const T = ids.length, LAYER = norm === "layer" && { LAYER: true };
  const found = await model.once((plan) => {
    const room = model.room(plan, T), kept = Array.from({ length: L + 1 }, () => ({})), wanted = [];
    const keep = (layer, name, x, width) => {
      kept[layer][name] = { buffer: plan.scratch(4 * T * width), width };
      plan.copy(x, 0, kept[layer][name].buffer, 0, 4 * T * width);
    };
    model.read(plan, ids, (site, layer, x, width) => {
      if (["resid", "heads", "mlp"].includes(site)) keep(layer, site, x, width);
      if (site === "attn" && norm_place !== "before") keep(layer, "attn_y", room.attn_y, C);  // attention before its norm
    }, room);
    const last = kept[L].resid.buffer, { rows, order } = unembeddings(model, plan, targets);
    const [alone, added, normed] = [kept[0].heads.width, C, C].map((width) => plan.scratch(4 * T * H * width));
    // x: n vectors for each position. dots(): their products with y, of which there is one for `each` of them.
    const dots = (x, y, n, each) => {
      const found = plan.scratch(4 * T * n);
      plan.add("dot", {}, [T * n, C, each], [x, y, found], gpu.groups(T * n));
      wanted.push([found, 4 * T * n]);
    };
    const logits = (x, n) => dots(order ? gpu.ordered(plan, { order, width: C }, x, T * n) : x, rows, n, n);
    const share = (path, whole, x, y, n) =>
      plan.add("norm_share", { ...LAYER }, [T * n, C, n, norm_eps], [model.weights.get(path).buffer, whole, x, y], gpu.groups(T * n));
    const weigh = (x, n = 1) => {
      dots(x, x, n, 1);
      share("norm", last, x, normed, n);
      logits(normed, n);
    };
    for (let layer = 0; layer <= L; layer++) {
      const { resid, heads, attn_y, mlp } = kept[layer], path = `blocks.${layer}`;
      weigh(resid.buffer);
      if (layer === L) break;
      plan.add("head_alone", {}, [T, H, heads.width], [heads.buffer, alone], gpu.threads(T * H * heads.width));
      const out = { ...model.weights.get(`${path}.attn.out`), bias: null };
      gpu.linear(plan, out, alone, attn_y ? normed : added, T * H);
      if (attn_y) share(`${path}.attn_post_norm`, attn_y.buffer, normed, added, H);
      model.scaled(plan, added, config.residual_scale, T * H * C);
      weigh(added, H);
      weigh(mlp.buffer);
    }
    model.norm(plan, "norm", last, normed, T, C);
    logits(normed, 1);
    if (model.head().bias) wanted.push([model.head().bias, 4 * config.vocab_size]);
    return wanted;
  }, signal);
  const numbers = found.map((bytes) => new Float32Array(bytes)), next = () => numbers.shift();
  const part = () => ({ norm: next().map(Math.sqrt), share: next().map((value) => value * logit_scale) });
  const states = [], heads = [], mlp = [];
  for (let layer = 0; layer < L; layer++) {
    states.push(part());
    const all = part(), of = (values, h) => values.filter((_, i) => i % H === h);
    heads.push(Array.from({ length: H }, (_, h) => ({ norm: of(all.norm, h), share: of(all.share, h) })));
    mlp.push(part());
  }
  states.push(part());
  const products = next(), biases = next(), logit = products.map((value, t) => logit_scale * (value + (biases?.[targets[t]] ?? 0)));
  const parts = [states[0], ...mlp, ...heads.flat()];
  return { norms: states.map((state) => state.norm), embedding: states[0], heads, mlp, logit,
    rest: logit.map((value, t) => value - parts.reduce((sum, { share }) => sum + share[t], 0)) };
}

/** The rows of the unembedding matrix of these tokens, a buffer (T, C), and the order of their columns, if they have another
 *  one: see ordered() in gpu.js. */
function unembeddings(model, plan, tokens) {
  const { gpu } = model, T = tokens.length, { u, v, ...head } = model.head();
  const { width, order } = u ?? head, rows = plan.scratch(4 * T * width);
  gpu.embed(plan, u ?? head, plan.scratch(Uint32Array.from(tokens)), rows, T);
  if (!u) return { rows, order };
  const products = plan.scratch(4 * T * v.width);  // rows of u v
  gpu.linear(plan, { ...v, order: null }, rows, products, T, { TRANSPOSE_W: true, N: v.width, K: v.rows });
  return { rows: products, order: v.order };
}
