// ---- variant valembed: value embeddings (modded-nanogpt, 2024; nanochat, 2026), as in model.py ----
//
//   v_t = v_t + g_t E_l[token_t],      g = 2 sigmoid(W h[:GATE]), one a head
//
// The last layer, and every second layer counted back from it, has a table E_l with a row for each token id.

const GATE = 32;  // width of the part of h that the gate reads

const hasValueEmbedding = ({ value_embeds, n_layer }, layer) => value_embeds && (n_layer - 1 - layer) % 2 === 0;

/** Add the shapes of a layer's own parameters. */
export function valueShapes(config, layer, path, shapes) {
  const { vocab_size, n_embd, n_kv_head, head_dim } = config;
  if (!hasValueEmbedding(config, layer)) return;
  shapes.set(`${path}.value_embed.weight`, [vocab_size, n_kv_head * head_dim]);
  shapes.set(`${path}.value_gate.weight`, [n_kv_head, Math.min(GATE, n_embd)]);
}

/** Buffers for R tokens, by name. */
export function valueRoom({ n_embd, n_kv_head, head_dim }, plan, R) {
  const sizes = { gate_input: Math.min(GATE, n_embd), value_gate: n_kv_head, value_embedding: n_kv_head * head_dim };
  return Object.fromEntries(Object.entries(sizes).map(([name, size]) => [name, plan.scratch(4 * R * size)]));
}

/** Add the gated embeddings of the tokens to the values v (R, KV D) of a layer, if it has a table. h (R, C): attention's input. */
export function addValueEmbedding(model, plan, path, layer, room, { h, v, R, T, tokens }) {
  const { gpu, config } = model, { n_embd: C, n_kv_head: KV, head_dim: D } = config, width = Math.min(GATE, C);
  if (!hasValueEmbedding(config, layer)) return;
  plan.add("first_columns", {}, [R, C, width], [h, room.gate_input], gpu.threads(R * width));
  model.linear(plan, `${path}.value_gate`, room.gate_input, room.value_gate, R);
  gpu.embed(plan, model.weights.get(`${path}.value_embed`), tokens, room.value_embedding, R, { T, factor: 1 });
  plan.add("value_embed", {}, [R, KV, D], [room.value_gate, room.value_embedding, v], gpu.threads(R * KV * D));
}

// ---- end of valembed ----
