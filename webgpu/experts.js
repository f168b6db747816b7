// ---- variant moe: mixture of experts (Shazeer et al. 2017; Fedus et al. 2022; Jiang et al. 2024), as in model.py ----
//
//   y = sum over the k experts of largest p_e of g_e MLP_e(x),   p = softmax(W x),   g = p_e / (sum of the k chosen);
//   g = p_e where k = 1
//
// A pair is a token and one of its k experts. A few pairs are computed as they come. Many are sorted by expert into blocks of
// rows, so that a kernel reads an expert's matrix once for all rows of a block.
//
// Shapes: R tokens, E = n_expert, k = expert_top_k, P = R k pairs, C = n_embd, F = ffn_dim of one expert.

const FEW = 64;   // pairs, from which on they are sorted
const ROWS = 32;  // of a block, as in experts_sort.wgsl and experts_matmul.wgsl
export const MOST_EXPERTS = 1024;  // as many as experts_sort.wgsl has counts for

/** Make of the shapes of one MLP at a path those of the experts, of their router, and of the bias that balances them. */
export function expertShapes({ n_expert: E, n_embd: C, router_bias, expert_balance }, path, shapes) {
  for (const [name, shape] of shapes) {
    if (/^(gate|up|down)\.(weight|bias)$/.test(name.slice(path.length + 1)) && name.startsWith(path)) shapes.set(name, [E, ...shape]);
  }
  shapes.set(`${path}.router.weight`, [E, C]);
  if (router_bias) shapes.set(`${path}.router.bias`, [E]);
  if (expert_balance === "bias") shapes.set(`${path}.balance`, [E]);
}

/** Buffers for the experts of one layer and R tokens, by name. */
export function expertRoom({ n_expert: E, expert_top_k: k, ffn_dim: F, n_embd: C, n_shared_expert }, isGated, plan, R) {
  const P = R * k, blocks = P < FEW ? 0 : Math.ceil(P / ROWS) + E, rows = P < FEW ? P : blocks * ROWS;
  const sizes = { router: R * E, chosen: P, gates: P, of_gate: rows * F, of_up: rows * F, of_act: rows * F, of_down: rows * C };
  if (!isGated) delete sizes.of_gate;
  if (blocks) sizes.sorted = blocks + rows + P;
  if (n_shared_expert) sizes.shared = R * C;
  return { blocks, ...Object.fromEntries(Object.entries(sizes).map(([name, size]) => [name, plan.scratch(4 * size)])) };
}

/** Add the steps of a layer's experts, from h (R, C) to y (R, C). The tap is called at the site "router". */
export function experts(model, plan, layer, room, h, y, R, tap) {
  const { gpu, config } = model, { n_expert: E, expert_top_k: k, ffn_dim: F, n_embd: C, n_shared_expert } = config;
  const path = `blocks.${layer}.mlp`, balance = model.weights.get(`${path}.balance`)?.buffer;
  const { of_gate, of_up, of_act, of_down, sorted, blocks } = room, rows = sorted ? blocks * ROWS : R * k;
  model.linear(plan, `${path}.router`, h, room.router, R);
  tap?.("router", layer, room.router, E);
  plan.add("experts_route", balance ? { BALANCE: true } : {}, [R, E, k], [room.router, balance ?? gpu.none, room.chosen, room.gates],
    gpu.threads(R));
  if (sorted) plan.add("experts_sort", {}, [R * k, E, blocks], [room.chosen, sorted], [1]);
  if (of_gate) product(model, plan, `${path}.gate`, room, h, of_gate, R, k);
  product(model, plan, `${path}.up`, room, h, of_up, R, k);
  model.activation(plan, of_gate, of_up, of_act, rows * F);
  product(model, plan, `${path}.down`, room, of_act, of_down, R, 0);
  plan.add("experts_sum", sorted ? { SORTED: true } : {}, [R, k, C, blocks + rows], [room.gates, sorted ?? gpu.none, of_down, y],
    gpu.threads(R * C));
  if (n_shared_expert) {
    model.neurons(plan, `${path}.shared`, F * n_shared_expert, room, h, room.shared, R);
    model.add(plan, y, room.shared, R * C);
  }
}

/** Each pair's product with a matrix of its expert. share: so many pairs read a row of x; 0: x has a row for each pair, in the
 *  order of y's rows. */
function product(model, plan, path, { chosen, sorted, blocks }, x, y, R, share) {
  const { gpu, config: { n_expert: E, expert_top_k: k } } = model;
  const { buffer, rows, width: K, bits, group, scaleBits, scales, biases, bias, order } = model.weights.get(path), N = rows / E;
  const settings = { BITS: bits, ...(bits < 16 && { GROUP: group, SCALE_BITS: scaleBits }), ...(bias && { BIAS: true }),
    ...(order && { ORDER: true }) };
  const buffers = [buffer, scales ?? gpu.none, biases ?? gpu.none, bias ?? gpu.none, x, y, sorted ?? chosen, order ?? gpu.none];
  if (sorted) plan.add("experts_matmul", settings, [N, K, E, blocks, share], buffers, [Math.ceil(N / 32), blocks]);
  else plan.add("experts_matvec", settings, [N, K, share || 1], buffers, [Math.ceil(N / 4), R * k]);
}

// ---- end of moe ----
