// The GPT of model.py, as plans of dispatches: loads a checkpoint, runs it, continues a text.
//
//   const model = await GPT.load(gpu, file);
//   for await (const { token } of model.generate(ids, { max_new_tokens: 100 })) ...
//
// Shapes: B sequences, T positions, C = n_embd, H heads, KV key/value heads, D = head_dim, F = ffn_dim, V = vocab_size.

import { checkDepth, depthAttention, depthRoom, depthShapes, enterBlock, isRouted, leaveBlock, skips } from "./depth.js";  // mod
import { checkDiff, diffRoom, diffShapes, joinsValues, pairsOf, readLambdas, subtractPairs } from "./diff.js";  // diff
import { UserError } from "./errors.js";
import { expertRoom, experts, expertShapes, MOST_EXPERTS } from "./experts.js";  // moe
import { Plan } from "./gpu.js";
import { readHeader, readTensor, toFloat32 } from "./safetensors.js";
import { attendToSinks, checkSinks, joinSinkLogits } from "./sinks.js";  // sinks
import { Tokenizer } from "./tokenizer.js";
import { addValueEmbedding, valueRoom, valueShapes } from "./value_embeds.js";  // valembed
import { checkFirstValues, mixFirstValues } from "./values.js";  // resformer
import { checkYoco, crosses, halfOf, sharedKeysValues, sharedNames, shareKeysValues } from "./yoco.js";  // yoco

// ---- config ---------------------------------------------------------------------------------------------------------

export const KINDS = { relu2: 0, gelu: 1, gelu_tanh: 2, swiglu: 3, geglu: 4, swiglu_clip: 5 };
const isGated = ({ mlp }) => KINDS[mlp] >= KINDS.swiglu;
const whole = (least) => (value) => Number.isInteger(value) && value >= least;
const number = (value) => Number.isFinite(value) && value >= 0;
const factor = (value) => Number.isFinite(value) && value > 0;
const flag = (value) => typeof value === "boolean";
const among = (...all) => (value) => all.includes(value);
// The settings that the page handles: the default value of each, as in model.py's GPTConfig, and a check of a value.
const SETTINGS = {
  block_size: [256, whole(1)], vocab_size: [4096, whole(1)], n_layer: [4, whole(1)], n_head: [2, whole(1)], n_kv_head: [0, whole(1)],
  n_embd: [128, whole(1)], head_dim: [0, whole(1)], ffn_dim: [0, whole(1)],  // configOf() replaces a 0
  pos: ["rope", among("rope", "learned", "none")], rope_theta: [1e4, factor], rope_factor: [1, factor], rope_low_freq: [1, number],
  rope_high_freq: [4, number], rope_original: [8192, number], norm: ["rms", among("rms", "layer")], norm_eps: [1e-5, number],
  mlp: ["relu2", among(...Object.keys(KINDS))], bias: [false, flag], qkv_bias: [false, flag], qk_norm: [true, flag], tie: [true, flag],
  rotary_dim: [0, whole(0)], rope_scaling: ["llama3", among("llama3", "linear", "yarn", "yarn_untruncated")], rope_pattern: ["R", (value) => /^[RN]+$/.test(value)],
  parallel: [false, flag], norm_place: ["before", among("before", "after", "both")], norm_bias: [false, flag], out_bias: [false, flag],
  head_bias: [false, flag], qk_norm_width: [false, flag], embed_scale: [1, factor], attn_scale: [0, number], residual_scale: [1, factor],
  logit_scale: [1, factor], window_theta: [0, number], attn_softcap: [0, number],
  alibi: [false, flag], sliding_window: [0, whole(0)], window_pattern: ["S", (value) => /^[SL]+$/.test(value)], softcap: [0, number],
  diff_attn: [false, flag], diff_attn_version: [1, among(1, 2)],  // diff
  yoco: [false, flag],  // yoco
  value_residual: [false, flag],  // resformer
  value_embeds: [false, flag],  // valembed
  sinks: [0, whole(0)], sink_logits: [false, flag],  // sinks
  n_expert: [0, whole(0)], expert_top_k: [2, whole(0)], n_shared_expert: [0, whole(0)], router_bias: [false, flag],  // moe
  expert_balance: ["loss", among("loss", "bias", "none")],  // moe
  mod: ["none", among("none", "topk", "soft")], mod_capacity: [0.125, factor], mod_every: [2, whole(1)],  // mod
};
// Every other setting must be off, but for these: they belong to another setting, without which they have no effect.
const PARTS = ["diff_attn_version", "expert_top_k", "expert_balance", "mod_capacity", "mod_every"];
const isOff = (value) => [false, 0, "none"].includes(value);

/** The config of a checkpoint, or any settings of GPTConfig, with defaults for what it lacks. UserError names the settings
 *  that the page cannot run, or one whose value makes no model. */
export function configOf(settings) {
  const senseless = (name) => new UserError(`This checkpoint has settings that make no model (${name}): make the checkpoint again.`);
  if (typeof settings !== "object" || settings === null) throw senseless("config");
  const lacks = Object.keys(settings).filter((name) => !Object.hasOwn(SETTINGS, name) && !PARTS.includes(name) &&
    !isOff(settings[name]));
  if (lacks.length) {
    throw new UserError(`This checkpoint uses ${lacks.join(", ")}, which this page cannot run: python sample.py can.`);
  }
  const defaults = Object.fromEntries(Object.entries(SETTINGS).map(([name, [value]]) => [name, value]));
  const config = { ...defaults, ...settings };
  config.n_kv_head ||= config.n_head;
  config.head_dim ||= config.n_embd / config.n_head;
  config.ffn_dim ||= isGated(config) ? Math.ceil(8 * config.n_embd / (3 * 64)) * 64 : 4 * config.n_embd;
  if (config.alibi) config.pos = "none";
  const wrong = Object.keys(SETTINGS).find((name) => !SETTINGS[name][1](config[name]));
  if (wrong) throw senseless(wrong);
  if (config.n_head % config.n_kv_head) throw senseless("n_kv_head");
  if (config.pos === "rope" && config.head_dim % 2) throw senseless("head_dim");
  if (config.mod !== "none" && config.mod_every > config.n_layer) throw senseless("mod_every");  // mod
  checkDepth(config);  // mod
  checkYoco(config);  // yoco
  checkFirstValues(config);  // resformer
  checkSinks(config);  // sinks
  checkDiff(config);  // diff
  if (config.n_expert && !(config.expert_top_k >= 1 && config.expert_top_k <= config.n_expert)) throw senseless("expert_top_k");  // moe
  if (config.n_expert > MOST_EXPERTS) throw new UserError(`This model has ${config.n_expert} experts: this page goes up to ${MOST_EXPERTS}.`);  // moe
  if (config.n_shared_expert && !config.n_expert) throw senseless("n_shared_expert");  // moe
  if (config.rotary_dim % 2 || config.rotary_dim > config.head_dim) throw senseless("rotary_dim");
  if (config.head_dim > 256) throw new UserError(`This model has heads of width ${config.head_dim}: this page goes up to 256.`);
  return config;
}

/** The numbers of a head that rotary positions turn. */
const rotaryOf = ({ rotary_dim, head_dim }) => rotary_dim || head_dim;

/** The angle by which each pair of a head turns from one position to the next: (R / 2,). See rope_inv_freq in model.py. */
function anglesOf(config) {
  const { rope_theta, rope_factor, rope_low_freq: low, rope_high_freq: high, rope_original, rope_scaling } = config, R = rotaryOf(config);
  const pair = (turns) => R * Math.log(rope_original / (2 * Math.PI * turns)) / (2 * Math.log(rope_theta));
  const [floor, ceil] = rope_scaling === "yarn" ? [Math.floor, Math.ceil] : [Number, Number];
  const [first, last] = [Math.max(floor(pair(high)), 0), Math.min(ceil(pair(low)), R - 1)];
  const within = (share) => Math.min(1, Math.max(0, share));
  return Float64Array.from({ length: R / 2 }, (_, i) => {
    const angle = rope_theta ** (-2 * i / R);
    if (rope_factor === 1) return angle;
    let keep = 0;  // 1: the angle stays; 0: it is divided by rope_factor
    if (rope_scaling === "llama3") keep = within((rope_original * angle / (2 * Math.PI) - low) / (high - low));
    if (rope_scaling.startsWith("yarn")) keep = 1 - within((i - first) / Math.max(last - first, 0.001));
    return keep * angle + (1 - keep) * angle / rope_factor;
  });
}

/** Cosine and sine for each position and each pair of a head: (block_size, R / 2, 2). */
function turnsOf(config) {
  const angles = anglesOf(config), R = rotaryOf(config), turns = new Float32Array(config.block_size * R);
  for (let at = 0, t = 0; t < config.block_size; t++) {
    for (const angle of angles) {
      turns[at++] = Math.cos(t * angle);
      turns[at++] = Math.sin(t * angle);
    }
  }
  return turns;
}

/** The slope of ALiBi for each head, `times` over; zeros without ALiBi. See alibi_slopes in model.py. */
function slopesOf({ n_head: H, alibi }, times = 1) {
  if (!alibi) return new Float32Array(times * H);
  const power = 2 ** Math.floor(Math.log2(H));
  const slopes = Array.from({ length: power }, (_, i) => 2 ** (-8 * (i + 1) / power));
  for (let i = 1; slopes.length < H; i += 2) slopes.push(2 ** (-4 * i / power));
  return Float32Array.from(slopes.flatMap((slope) => new Array(times).fill(slope)));
}

/** The shapes of a config's parameters: a Map from names to [rows, width] of matrices, [width] of vectors, and
 *  [E, rows, width] of E matrices that lie together. */
export function parametersOf(config) {
  const { vocab_size: V, n_embd: C, ffn_dim: F, head_dim: D } = config, found = new Map();
  const linear = (path, rows, width, bias) => {
    found.set(`${path}.weight`, [rows, width]);
    if (bias) found.set(`${path}.bias`, [rows]);
  };
  const mlp = (path, F) => {
    if (isGated(config)) linear(`${path}.gate`, F, C, config.bias);
    linear(`${path}.up`, F, C, config.bias);
    linear(`${path}.down`, C, F, config.bias);
  };
  const norm = (path, width, layer = config.norm === "layer") => {
    found.set(`${path}.weight`, [width]);
    if (layer && (config.bias || config.norm_bias)) found.set(`${path}.bias`, [width]);
  };
  const bias = config.bias || config.qkv_bias;
  const keysValues = (path, layer) => {
    linear(`${path}.k`, config.n_kv_head * D, C, bias);
    linear(`${path}.v`, config.n_kv_head * D, C, bias);
    if (config.qk_norm) norm(`${path}.k_norm`, config.qk_norm_width ? config.n_kv_head * D : D, false);
    if (config.value_residual && layer > 0) found.set(`${path}.value_mix`, [2]);  // resformer
    valueShapes(config, layer, path, found);  // valembed
  };
  found.set("embed.weight", [V, C]);
  if (config.pos === "learned") found.set("pos_embed.weight", [config.block_size, C]);
  for (let layer = 0; layer < config.n_layer; layer++) {
    const at = `blocks.${layer}`, { norm_place } = config;
    let queries = config.n_head;
    if (config.diff_attn) ({ queries } = pairsOf(config));  // diff
    linear(`${at}.attn.q`, queries * D, C, bias);
    if (!crosses(config, layer))  // yoco
    keysValues(`${at}.attn`, layer);
    linear(`${at}.attn.out`, C, config.n_head * D, config.bias || config.out_bias);
    if (config.qk_norm) norm(`${at}.attn.q_norm`, config.qk_norm_width ? config.n_head * D : D, false);
    if (config.diff_attn) diffShapes(config, `${at}.attn`, found);  // diff
    if (config.sink_logits) found.set(`${at}.attn.sink.weight`, [queries]);  // sinks
    if (isRouted(config, layer)) depthShapes(config, at, found);  // mod
    mlp(`${at}.mlp`, F);
    if (config.n_expert) expertShapes(config, `${at}.mlp`, found);  // moe
    if (config.n_shared_expert) mlp(`${at}.mlp.shared`, F * config.n_shared_expert);  // moe
    for (const part of ["attn", "mlp"]) {
      if (norm_place !== "after") norm(`${at}.${part}_norm`, C);
      if (norm_place !== "before") norm(`${at}.${part}_post_norm`, C);
    }
  }
  if (config.yoco) keysValues("shared", halfOf(config)), norm("shared.norm", C);  // yoco
  norm("norm", C);
  if (!config.tie) linear("head", V, C, config.head_bias);
  return found;
}

// ---- model ----------------------------------------------------------------------------------------------------------

/** The longest context that the page takes, unless it is opened with ?context=N: keys and values of more tokens might not fit
 *  into a graphics card's memory. Positions that are learned are not cut. */
export const CONTEXT = 2048;
const CHUNKS = [64, 256, 512, 1024];  // tokens of a prompt that are read at a time: the least that holds them; on a processor 64
const FEW = 8;     // up to so many are read one by one, by the kernels that writing needs too
// Before their ids are read, which takes a part of a millisecond, so many tokens are computed as fit into FRAME milliseconds, at
// most BURST. AHEAD such reads are under way before the caller has taken the tokens of the first one.
const BURST = 16, FRAME = 16, AHEAD = 2;
const MAXIMA = 1024;  // 4 for each thread of sample.wgsl

export class GPT {
  /** Load a checkpoint of train.py, hqq.py, a reader ...; onProgress(share) is called while it is read. context: the most
   *  tokens of its context that it may use. */
  static async load(gpu, blob, onProgress = () => {}, context = CONTEXT) {
    const { meta, tensors } = await readHeader(blob), name = blob.name ?? "This file";
    if (!meta?.config) {
      const why = meta?.lens ? "a file of lenses: drop it on the lens panel" : meta?.adapter ? "an adapter: lora.py --merge folds it into its model"
        : "a safetensors file, but not a checkpoint of this project: python hf_reader.py makes one of a Hugging Face folder";
      throw new UserError(`${name} is ${why}.`);
    }
    const config = configOf(meta.config), { block_size } = config;
    if (config.pos !== "learned") config.block_size = Math.min(block_size, context);
    gpu.kernel("attention", { WIDTH: config.head_dim }).catch(() => {});  // this kernel compiles longest: begin while weights are read
    const weights = new Map(), made = [];
    const keep = (content) => (made.push(gpu.buffer(content)), made.at(-1));
    try {
      const shapes = await gpu.guard(() => readWeights(gpu, blob, config, tensors, weights, keep, onProgress));
      return new GPT(gpu, config, weights, { meta, made, blob, shapes, whole_context: block_size });
    } catch (error) {
      made.forEach((buffer) => buffer.destroy());
      throw error;
    }
  }

  /** weights: a Map from paths to {buffer, rows, width, bits, group, scaleBits, scales, biases, bias} of matrices, and
   *  {buffer, bias} of norms; each buffer is a buffer or {buffer, offset, size}. made: buffers that the GPT destroys with
   *  itself. blob: the file that it was read from; shapes: of the parameters in it; whole_context: its context, of which
   *  config.block_size may be a part. */
  constructor(gpu, config, weights, { meta, made = [], blob = null, shapes = parametersOf(config), whole_context = config.block_size }) {
    Object.assign(this, { gpu, config, weights, meta, made, blob, whole_context });
    for (let layer = 0; layer < config.n_layer; layer++) {
      for (const [path, parts] of [["attn.qkv", ["attn.q", "attn.k", "attn.v"]], ["mlp.gate_up", ["mlp.gate", "mlp.up"]]]) {
        if (path === "mlp.gate_up" && config.n_expert) continue;  // moe
        join(gpu, weights, made, `blocks.${layer}.${path}`, parts.map((part) => `blocks.${layer}.${part}`));
      }
    }
    this.enc = meta.tokenizer ? new Tokenizer(meta.tokenizer) : null;
    this.chat = this.enc && meta.chat?.template && meta.chat.template === meta.template ? meta.chat : null;  // see promptOf()
    this.ends = new Set([this.enc?.eot, ...(Array.isArray(meta.ends) ? meta.ends : []), this.chat?.end]);  // after these a text is over
    this.n_vocab = Math.min(this.enc?.n_vocab ?? config.vocab_size, config.vocab_size);  // ids from here on are padding
    this.bytes = made.reduce((sum, buffer) => sum + buffer.size, 0);
    this.n_parameters = [...shapes.values()].reduce((sum, shape) => sum + shape.reduce((a, b) => a * b), 0);
    const { bits = 32, group } = weights.get("blocks.0.mlp.up");
    const ofEmbedding = weights.get("embed").bits ?? 32;
    this.format = (bits < 16 ? `${bits} bits, groups of ${group}` : `float${bits}`) +
      (ofEmbedding === bits ? "" : `; embedding of ${ofEmbedding} bits`);
    // Query heads; and the heads that the output projection reads, and their width
    Object.assign(this, { queries: config.n_head, heads: config.n_head, head_width: config.head_dim });
    if (config.diff_attn) ({ queries: this.queries, pairs: this.heads, width: this.head_width } = pairsOf(config));  // diff
    this.carried = [];  // of a room, the buffers (R, KV D) that later layers read
    if (config.yoco) this.carried.push(...sharedNames(config));  // yoco
    if (config.value_residual) this.carried.push("first_values");  // resformer
    let slopes = slopesOf(config);
    if (config.diff_attn) slopes = slopesOf({ ...config, n_head: this.heads }, 2);  // diff
    this.slopes = this.own(slopes);
    this.turns = config.pos === "rope" ? this.own(turnsOf(config)) : gpu.none;
    this.window_turns = config.pos === "rope" && config.window_theta ?
      this.own(turnsOf({ ...config, rope_theta: config.window_theta, rope_factor: 1 })) : this.turns;
    this.scale = config.attn_scale || config.head_dim ** -0.5;
  }

  own(content) {
    this.made.push(this.gpu.buffer(content));
    return this.made.at(-1);
  }

  /** A plan that is built once for each key and kept in `plans`: build(plan) adds its steps, and returns properties that are
   *  kept with it. */
  async planned(plans, key, build) {
    const paths = JSON.stringify(this.gpu.paths);
    let found = plans.get(key);
    if (found?.paths !== paths) {  // there is none yet, or it has slower kernels
      found?.plan.destroy();
      const plan = new Plan(this.gpu);
      found = { plan, paths, ...build(plan) };
      await this.gpu.guard(() => plan.ready());
      plans.set(key, found);
    }
    return found;
  }

  destroy() {
    this.written?.destroy();
    this.made.forEach((buffer) => buffer.destroy());
  }

  /** The number of keys that a layer's queries see; 0: all. */
  windowOf(layer) {
    const { sliding_window, window_pattern } = this.config;
    if (crosses(this.config, layer)) return 0;  // yoco
    return window_pattern[layer % window_pattern.length] === "S" ? sliding_window : 0;
  }

  sinksOf(layer) { return this.windowOf(layer) && this.config.sinks; }  // sinks

  /** The numbers of a head that a layer's rotary positions turn: 0 in a layer without them. */
  rotaryOf(layer) {
    const { pos, rope_pattern } = this.config;
    return pos === "rope" && rope_pattern[layer % rope_pattern.length] === "R" ? rotaryOf(this.config) : 0;
  }

  turnsOf(layer) { return this.windowOf(layer) ? this.window_turns : this.turns; }

  /** The buffers of the queries and keys, of those in a room, of which a layer's scores are computed. */
  scored(layer, room) {
    if (this.rotaryOf(layer)) return [room.qr, room.kr];
    return this.config.qk_norm ? [room.qn, room.kn] : [room.q, room.k];
  }

  // ---- forward ------------------------------------------------------------------------------------------------------

  /** Buffers for the activations of one block, R rows each, by name. */
  room(plan, R) {
    const { n_embd: C, n_head, n_kv_head: KV, head_dim: D, ffn_dim } = this.config, H = this.queries;
    let F = ffn_dim;
    if (this.config.n_expert) F *= this.config.n_shared_expert;  // moe
    const sizes = { h: C, q: H * D, qn: H * D, qr: H * D, k: KV * D, kn: KV * D, kr: KV * D, v: KV * D, o: n_head * D, lse: 2 * H,
      attn_y: C, attn: C, h2: C, up: F, gate: F, act: F, mlp_y: C, mlp: C };
    if (!this.config.qk_norm) delete sizes.qn, delete sizes.kn;
    if (this.config.pos !== "rope") delete sizes.qr, delete sizes.kr;
    if (!isGated(this.config)) delete sizes.gate;
    if (this.config.norm_place === "before") delete sizes.attn_y, delete sizes.mlp_y;  // their values before the norm
    const room = Object.fromEntries(Object.entries(sizes).map(([name, width]) => [name, plan.scratch(4 * R * width)]));
    for (const [path, names] of R === 1 ? [["attn.qkv", ["q", "k", "v"]], ["mlp.gate_up", ["gate", "up"]]] : []) {
      const widths = names.map((name) => 4 * sizes[name]);
      if (!this.weights.has(`blocks.0.${path}`) || widths.some((width) => width % 256)) continue;
      const together = plan.scratch(widths.reduce((a, b) => a + b));
      room[path] = together;
      names.forEach((name, i) => { room[name] = part(together, widths, i); });
    }
    if (this.config.value_residual) room.first_values = plan.scratch(4 * R * KV * D);  // resformer
    if (this.config.value_embeds) Object.assign(room, valueRoom(this.config, plan, R));  // valembed
    if (this.config.diff_attn) Object.assign(room, diffRoom(this.config, plan, R));  // diff
    if (this.config.mod !== "none") Object.assign(room, depthRoom(this.config, plan, R));  // mod
    if (this.config.n_expert) Object.assign(room, expertRoom(this.config, isGated(this.config), plan, R));  // moe
    return room;
  }

  norm(plan, path, x, y, R, C, more = null) {
    const { buffer, bias } = this.weights.get(path), LAYER = this.config.norm === "layer" && !/\.[qk]_norm$/.test(path);
    const settings = { ...(LAYER && { LAYER }), ...(more && { ADD: true }), ...(bias && { BIAS: true }), ...(C > 256 && { SIZE: 256 }) };
    plan.add("norm", settings, [R, C, this.config.norm_eps], [buffer, bias ?? this.gpu.none, more ?? this.gpu.none, x, y], this.gpu.groups(R));
  }

  linear(plan, path, x, y, M) { this.gpu.linear(plan, this.weights.get(path), x, y, M); }

  add(plan, x, y, n) { plan.add("add", {}, [n], [y, x], this.gpu.threads(n)); }

  scaled(plan, x, factor, n) { if (factor !== 1) plan.add("scale", {}, [n, factor], [x], this.gpu.threads(n)); }

  /** The input of attention or MLP: the norm of x, in y; or x where there is none before them. `more` is first added to x. */
  entering(plan, path, x, y, R, more = null) {
    const C = this.config.n_embd;
    if (this.config.norm_place !== "after") this.norm(plan, path, x, y, R, C, more);
    else if (more) this.add(plan, x, more, R * C);
    return this.config.norm_place === "after" ? x : y;
  }

  /** From the output of attention or MLP to what is added to the stream: `part` of a room. */
  leaving(plan, layer, part, room, R) {
    const C = this.config.n_embd;
    if (room[`${part}_y`]) this.norm(plan, `blocks.${layer}.${part}_post_norm`, room[`${part}_y`], room[part], R, C);
    this.scaled(plan, room[part], this.config.residual_scale, R * C);
  }

  /** Add to the plan the steps from tokens (B T,) to the residual stream after the last block (B T, C), whose buffer is
   *  returned.
   *
   *  at: a buffer of two numbers, the position of the first token, and how many of the T tokens are not padding. cache:
   *  {k, v, ...}, a buffer of block_size rows for each layer, which the tokens continue. tap(site, layer, buffer, width): may
   *  add steps that read or change the buffer (B T, width); sites are model.py's resid, heads, attn, mlp. rooms(layer):
   *  the layer's buffers, see room(). start, stream: begin at a later layer, with its input. embedded: a buffer for the
   *  input of the first layer. filling: nothing but the cache will be read.
   */
  forward(plan, { B, T, tokens, at, cache = null, tap = null, rooms, start = 0, stream = null, embedded = null, filling = false }) {
    const { n_embd: C, n_layer } = this.config, R = B * T, { gpu } = this;
    let x = stream, more = null;  // the residual stream, and a buffer that is still to be added to it
    if (!x) {
      x = embedded ?? plan.scratch(4 * R * C);
      const positions = this.weights.get("pos_embed")?.buffer;
      gpu.embed(plan, this.weights.get("embed"), tokens, x, R, { T, factor: this.config.embed_scale, at, positions });
    }
    const complete = () => {
      if (more) this.add(plan, x, more, R * C);
      more = null;
    };
    const whole = (layer) => {
      complete();
      tap?.("resid", layer, x, C);
    };
    for (let layer = start; layer < n_layer; layer++) {
      const room = rooms(layer), path = `blocks.${layer}`;
      if (tap) whole(layer);
      if (this.config.yoco && layer === halfOf(this.config)) {  // yoco
        complete();  // yoco
        shareKeysValues(this, plan, room, { x, R, T, at, tokens, cache });  // yoco
        if (filling) return x;  // yoco
      }  // yoco
      if (isRouted(this.config, layer)) complete(), enterBlock(this, plan, layer, room, { x, R, T, at, cache, tap });  // mod
      if (R === 1 && cache && !tap && this.fuses(layer, room)) {
        this.attention(plan, layer, room, { h: x, B, T, at, tokens, cache, fused: true });
        this.fusedNeurons(plan, `blocks.${layer}`, room, x);
        continue;
      }
      const h = this.entering(plan, `${path}.attn_norm`, x, room.h, R, more);
      let h2 = this.config.parallel ? this.entering(plan, `${path}.mlp_norm`, x, room.h2, R) : null;
      this.attention(plan, layer, room, { h, B, T, at, tokens, cache, tap });
      tap?.("attn", layer, room.attn, C);
      if (h2) this.add(plan, room.attn, x, R * C);  // room.attn is the stream from here on
      else h2 = this.entering(plan, `${path}.mlp_norm`, room.attn, room.h2, R, x);  // this adds x to it too
      this.mlp(plan, layer, room, h2, R, tap);
      tap?.("mlp", layer, room.mlp, C);
      [x, more] = [room.mlp, room.attn];
      if (isRouted(this.config, layer)) leaveBlock(this, plan, room, R), more = null;  // mod
    }
    whole(n_layer);
    return x;
  }

  /** Whether the products of a layer compute for one token what else lies around them, see gpu.vector(): the norm before
   *  them, the activation, and the sum with the stream, which stays in one buffer. */
  fuses(layer, room) {
    const { norm_place, parallel, residual_scale, qk_norm_width } = this.config, gated = isGated(this.config);
    if (this.config.n_expert) return false;  // moe
    if (isRouted(this.config, layer)) return false;  // mod
    if (this.config.yoco) return false;  // yoco
    if (this.config.diff_attn) return false;  // diff
    if (this.config.value_residual) return false;  // resformer
    if (this.config.value_embeds) return false;  // valembed
    const usual = norm_place === "before" && !parallel && residual_scale === 1 && !qk_norm_width;
    return usual && room["attn.qkv"] && (!gated || room["mlp.gate_up"]) && ["attn.qkv", "attn.out", gated ? "mlp.gate_up" : "mlp.up",
      "mlp.down"].every((name) => this.gpu.fuses(this.weights.get(`blocks.${layer}.${name}`)));
  }

  /** The product of one row with the norm of x. */
  ofNorm(plan, path, norm, x, y) {
    this.gpu.vector(plan, this.weights.get(path), x, y,
      { norm: this.weights.get(norm), LAYER: this.config.norm === "layer", eps: this.config.norm_eps });
  }

  /** x += MLP(norm(x)) of one token. path: of its block. */
  fusedNeurons(plan, path, room, x) {
    const [name, up] = isGated(this.config) ? ["gate_up", room["mlp.gate_up"]] : ["up", room.up];
    this.ofNorm(plan, `${path}.mlp.${name}`, `${path}.mlp_norm`, x, up);
    this.gpu.vector(plan, this.weights.get(`${path}.mlp.down`), up, x, { KIND: KINDS[this.config.mlp], ACCUMULATE: true });
  }

  attention(plan, layer, room, { h, B, T, at, tokens, cache, tap, fused = false }) {
    const { n_head, n_kv_head: KV, head_dim: D, block_size, attn_softcap, qk_norm, norm_eps } = this.config;
    const H = this.queries, R = B * T, { gpu } = this;
    const path = `blocks.${layer}.attn`, rotary = this.rotaryOf(layer);
    const of_heads = [H, KV, D, this.windowOf(layer), this.scale, attn_softcap];
    let one = R === 1 && cache && D % 4 === 0 && !gpu.info.fallback;  // for this kernel, which computes no lse
    let tiled = gpu.tilesAttention(T, D), settings = { WIDTH: D }, { o } = room, width = D;
    if (this.sinksOf(layer) || this.config.sink_logits) one = false;  // sinks
    if (this.config.diff_attn) [o, width] = [room.pair_outputs, this.head_width];  // diff
    if (joinsValues(this.config)) [one, tiled, settings] = [false, false, { WIDTH: width, JOINED: 2 }];  // diff
    if (skips(this.config, layer)) one = false;  // mod
    const enters = one && this.projectsJointly(layer, room, cache);
    const [q, k, v] = this.queriesKeysValues(plan, layer, room, { h, R, T, at, tokens, cache, fused, enters });
    if (skips(this.config, layer)) depthAttention(this, plan, layer, room, { B, T, at, q, k, v, cache, of_heads });  // mod
    else  // mod
    if (one) {
      plan.add("attention_one", enters ? { ENTERS: true, ...(qk_norm && { NORM: true }) } : {},
        [...of_heads, enters ? rotary : 0, norm_eps],
        [at, enters && rotary ? this.turnsOf(layer) : this.slopes, ...this.headNorms(path), q, k, v, o], [H]);
    } else {
      plan.add(tiled ? "attention_tiled" : "attention", settings, [T, cache ? block_size : T, ...of_heads],
        [at, this.slopes, q, k, v, o, room.lse], [Math.ceil(T / (tiled ? 64 : 4)), H, B]);
    }
    if (this.sinksOf(layer)) attendToSinks(this, plan, layer, { R, T, at, cache, q, k, v, o, lse: room.lse });  // sinks
    if (this.config.sink_logits) joinSinkLogits(this, plan, path, { R, H, width, o, lse: room.lse });  // sinks
    if (this.config.diff_attn) subtractPairs(this, plan, layer, room, h, R);  // diff
    tap?.("heads", layer, room.o, n_head * D);
    if (fused) return gpu.vector(plan, this.weights.get(`${path}.out`), room.o, h, { ACCUMULATE: true });
    this.linear(plan, `${path}.out`, room.o, room.attn_y ?? room.attn, R);
    this.leaving(plan, layer, "attn", room, R);
  }

  /** Whether queries, keys and values of one token come from one product. */
  projectsJointly(layer, room, cache) {
    if (crosses(this.config, layer)) return false;  // yoco
    if (this.config.value_residual) return false;  // resformer
    if (this.config.value_embeds) return false;  // valembed
    return Boolean(cache && room["attn.qkv"] && this.weights.has(`blocks.${layer}.attn.qkv`) && !this.config.qk_norm_width);
  }

  /** The weights of the norms of a head's queries and keys. */
  headNorms(path) {
    return ["q_norm", "k_norm"].map((name) => this.weights.get(`${path}.${name}`)?.buffer ?? this.gpu.none);
  }

  /** Add the steps from h (R, C) to the queries (R, H, D), and the keys and values (R or block_size, KV, D) of a layer, with
   *  their norms and positions. Returns their buffers. enters: only the product qkv, of which attention_one computes the rest. */
  queriesKeysValues(plan, layer, room, { h, R, T, at, tokens, cache, fused, enters }) {
    const { n_kv_head: KV, head_dim: D, qk_norm, norm_eps } = this.config, H = this.queries, { gpu } = this;
    const path = `blocks.${layer}.attn`, rotary = this.rotaryOf(layer);
    if (crosses(this.config, layer)) return [this.queriesOf(plan, path, layer, room, { h, R, T, at }), ...sharedKeysValues(this, room, cache)];  // yoco
    if (this.projectsJointly(layer, room, cache)) {
      if (fused) this.ofNorm(plan, `${path}.qkv`, `${path}_norm`, h, room["attn.qkv"]);
      else this.linear(plan, `${path}.qkv`, h, room["attn.qkv"], R);
      const [k, v] = [cache.k[layer], cache.v[layer]];
      if (enters) return [room["attn.qkv"], k, v];
      const same = !qk_norm && !rotary;  // queries stay where they are
      const qkv = same ? { buffer: room["attn.qkv"], offset: 4 * H * D, size: 8 * KV * D } : room["attn.qkv"];
      const q = same ? room.q : room.qr ?? room.qn;
      plan.add("enter_cache", qk_norm ? { NORM: true } : {}, [same ? 0 : H, KV, D, rotary, norm_eps],
        [at, rotary ? this.turnsOf(layer) : gpu.none, ...this.headNorms(path), qkv, same ? gpu.trash : q, k, v], [(same ? 0 : H) + 2 * KV]);
      return [q, k, v];
    }
    return [this.queriesOf(plan, path, layer, room, { h, R, T, at }), ...this.keysValues(plan, path, layer, room, { h, R, T, at, tokens, cache })];
  }

  queriesOf(plan, path, layer, room, { h, R, T, at }) {
    const H = this.queries, q = this.normed(plan, path, "q", H, room, h, R), rotary = this.rotaryOf(layer);
    if (!rotary) return q;
    this.turn(plan, layer, q, room.qr, { H, R, T, at, rotary });
    return room.qr;
  }

  keysValues(plan, path, layer, room, { h, R, T, at, tokens, cache }) {
    const { n_kv_head: H } = this.config, k = this.normed(plan, path, "k", H, room, h, R), { v } = room, rotary = this.rotaryOf(layer);
    this.linear(plan, `${path}.v`, h, v, R);
    if (this.config.value_embeds) addValueEmbedding(this, plan, path, layer, room, { h, v, R, T, tokens });  // valembed
    if (this.config.value_residual) mixFirstValues(this, plan, path, layer, room, v, R);  // resformer
    if (cache) {
      this.turn(plan, layer, k, cache.k[layer], { H, R, T, at, rotary }, { CACHE: true });
      this.turn(plan, layer, v, cache.v[layer], { H, R, T, at, rotary: 0 }, { CACHE: true });
      return [cache.k[layer], cache.v[layer]];
    }
    if (!rotary) return [k, v];
    this.turn(plan, layer, k, room.kr, { H, R, T, at, rotary });
    return [room.kr, v];
  }

  /** The queries (name "q") or keys ("k") of h (R, C) after their norm, if they have one: their buffer. */
  normed(plan, path, name, H, room, h, R) {
    const { head_dim: D, qk_norm, qk_norm_width } = this.config, to = room[`${name}n`];
    this.linear(plan, `${path}.${name}`, h, room[name], R);
    if (!qk_norm) return room[name];
    this.norm(plan, `${path}.${name}_norm`, room[name], to, ...(qk_norm_width ? [R, H * D] : [R * H, D]));  // of all heads together, or of each
    return to;
  }

  /** Turn `rotary` numbers of each head of x (R, H, D) by their positions: see rope.wgsl. */
  turn(plan, layer, x, y, { H, R, T, at, rotary }, settings = {}) {
    const { head_dim: D } = this.config;
    plan.add("rope", settings, [R, T, H, D, rotary], [at, this.turnsOf(layer), x, y], this.gpu.threads(R * H * Math.ceil(D / 2)));
  }

  mlp(plan, layer, room, h, R, tap) {
    const y = room.mlp_y ?? room.mlp;
    if (this.config.n_expert) experts(this, plan, layer, room, h, y, R, tap);  // moe
    else  // moe
    this.neurons(plan, `blocks.${layer}.mlp`, this.config.ffn_dim, room, h, y, R);
    this.leaving(plan, layer, "mlp", room, R);
  }

  /** An MLP of F neurons, from h (R, C) to y (R, C). */
  neurons(plan, path, F, room, h, y, R) {
    if (room["mlp.gate_up"] && this.weights.has(`${path}.gate_up`)) this.linear(plan, `${path}.gate_up`, h, room["mlp.gate_up"], R);
    else {
      if (room.gate) this.linear(plan, `${path}.gate`, h, room.gate, R);
      this.linear(plan, `${path}.up`, h, room.up, R);
    }
    this.activation(plan, room.gate, room.up, room.act, R * F);
    this.linear(plan, `${path}.down`, room.act, y, R);
  }

  activation(plan, gate, x, y, n) {
    plan.add("activation", { KIND: KINDS[this.config.mlp] }, [n], [gate ?? x, x, y], this.gpu.threads(Math.ceil(n / 4)));
  }

  head() { return this.weights.get(this.config.tie ? "embed" : "head"); }

  /** Add the steps from the stream x (R, C) to the logits (R, V), whose buffer is returned. */
  unembed(plan, x, R, logits = plan.scratch(4 * R * this.config.vocab_size)) {
    const { n_embd: C, vocab_size: V, softcap } = this.config, h = plan.scratch(4 * R * C);
    this.norm(plan, "norm", x, h, R, C);
    this.gpu.linear(plan, this.head(), h, logits, R);
    this.scaled(plan, logits, this.config.logit_scale, R * V);
    if (softcap) plan.add("softcap", {}, [R * V, softcap], [logits], this.gpu.threads(R * V));
    return logits;
  }

  /** The ids by which a model that was trained on conversations is asked to answer a message: see chat_entry in
   *  conversations.py. */
  promptOf(message) {
    const { before, after, strips } = this.chat;
    if (!message.trim()) throw new UserError("There is nothing to answer: type a message.");
    if (Array.isArray(before)) return [...before, ...this.enc.encode(message), ...after];
    const text = strips ? message.replace(/^[\p{White_Space}\x1c-\x1f]+|[\p{White_Space}\x1c-\x1f]+$/gu, "") : message;
    return [...this.enc.encode(before + text + after, true)];
  }

  checkPrompt(ids) {
    const { block_size, vocab_size } = this.config;
    if (!ids.length) throw new UserError("There is nothing to continue: type a prompt.");
    if (ids.length > block_size) {
      const whole = this.whole_context, most = whole > block_size ? `this page takes ${block_size} of this model's ${whole}: shorten it, or ` +
        `open the page with ?context=${Math.min(whole, 2 * ids.length)}.` : `this model's context is ${block_size}: shorten it.`;
      throw new UserError(`The prompt has ${ids.length} tokens, and ${most}`);
    }
    if (ids.some((id) => !(id < vocab_size))) throw new UserError("The prompt has tokens that this model does not know.");
  }

  /** Run a plan once. build(plan) adds its steps and returns the buffers to read, with sizes in bytes: [[buffer, size],
   *  ...]. The result is their contents. signal: see Plan.runInParts; null: the plan runs as a whole. */
  async once(build, signal = null) {
    const plan = new Plan(this.gpu);
    try {
      return await this.gpu.guard(async () => {
        const wanted = build(plan);
        await plan.ready();
        if (signal) await plan.runInParts(signal);
        else plan.run();
        return Promise.all(wanted.map(([buffer, size]) => this.gpu.read(buffer, size)));
      });
    } finally {
      plan.destroy();
    }
  }

  /** forward() of ids (T,), without a cache. */
  read(plan, ids, tap = null, room = this.room(plan, ids.length)) {
    const T = ids.length, tokens = plan.scratch(Uint32Array.from(ids)), at = plan.scratch(Uint32Array.of(0, T));
    return this.forward(plan, { B: 1, T, tokens, at, tap, rooms: () => room });
  }

  /** The logits of ids (T,): T V numbers. */
  async logits(ids) {
    this.checkPrompt(ids);
    const T = ids.length, V = this.config.vocab_size;
    const [found] = await this.once((plan) => [[this.unembed(plan, this.read(plan, ids), T), 4 * T * V]]);
    return new Float32Array(found);
  }

  // ---- generate -----------------------------------------------------------------------------------------------------

  /** The writer of the page's text. */
  writer() { return this.written ??= new Writer(this); }

  /** The plan of a pass over T tokens, which continue a writer's cache. draws: whether the next token is drawn after them, as
   *  it is after the last chunk of a prompt, and after each token that was drawn. probabilities: see generate(). */
  pass(T, draws, probabilities = false, writer = this.writer()) {
    const { at, token, last, drawn, tops, divergence, changes } = writer, { n_embd: C, vocab_size: V } = this.config;
    return this.planned(writer.plans, `pass ${T} ${draws} ${probabilities}`, (plan) => {
      const room = this.room(plan, T), all = [];
      for (const [i, cache] of writer.caches.entries()) {  // a second one is of the unchanged model
        let x = this.forward(plan, { B: 1, T, tokens: token, at, cache, tap: i ? null : changes?.tap(plan, at, T), rooms: () => room,
          filling: !draws });
        if (!draws) continue;
        if (T > 1) {
          const row = plan.scratch(4 * C);
          plan.add("rows", {}, [1, C], [last, x, row], this.gpu.threads(C));
          x = row;
        }
        all.push(this.unembed(plan, x, 1));
        if (probabilities) plan.add("top", {}, [1, V, this.n_vocab], [this.gpu.none, all[i], tops[i]], [1]);
      }
      if (!draws) return {};
      const [logits, unchanged] = all;
      if (unchanged && probabilities) plan.add("divergence", {}, [this.n_vocab], [unchanged, logits, divergence], [1]);
      const maxima = plan.scratch(8 * MAXIMA);
      plan.add("maxima", {}, [this.n_vocab], [logits, maxima], [MAXIMA / 64]);
      const sample = plan.add("sample", {}, [this.n_vocab, 0, 1, 1, 0], [logits, maxima, at, token, drawn], [1]);
      return { sample };
    });
  }

  /** Continue ids: yields {token, top, context}. top: with `probabilities`, the five most probable tokens, [[id, p], ...],
   *  before temperature and filters. context: how many of the tokens before it the model has read for it. When the context is
   *  full, its second half is read again, as in model.py. A writer has one generation at a time. If it has changes,
   *  each token also has `unchanged`, the five of the unchanged model after the text that the changed one has written, and
   *  `divergence`, KL(unchanged || changed) in nats. */
  async* generate(ids, { max_new_tokens = 200, temperature = 0.8, top_k = 50, top_p = 1, min_p = 0, seed = 0, signal, probabilities,
    writer = this.writer() } = {}) {
    this.checkPrompt(ids);
    const { gpu } = this, { block_size } = this.config, { at, token, last, drawn, changes } = writer;
    const told = !probabilities ? [] : [...writer.tops.map((top) => [top, 64]), ...(changes ? [[writer.divergence, 4]] : [])];
    const ready = async (T, draws) => {
      const { plan, sample } = await this.pass(T, draws, Boolean(probabilities), writer);
      if (draws) plan.set(sample, [this.n_vocab, top_k, temperature, top_p, min_p]);
      return plan;
    };
    const history = Array.from(ids);
    let offset = 0, steps = 0;
    const read = async (tokens) => {  // reads them into an empty cache, and draws the next one
      changes?.begin(history.length - tokens.length);
      const sizes = tokens.length <= FEW ? [1] : gpu.info.fallback ? CHUNKS.slice(0, 1) : CHUNKS;
      for (let start = 0, size; start < tokens.length; start += size) {
        size = sizes.find((each) => each >= tokens.length - start) ?? sizes.at(-1);
        const part = Uint32Array.from(tokens.slice(start, start + size));
        const plan = await ready(size, start + size >= tokens.length);
        gpu.write(token, part);
        gpu.write(at, Uint32Array.of(start, part.length, steps, seed));
        gpu.write(last, Uint32Array.of(part.length - 1));
        plan.run();
      }
      offset = tokens.length;
    };
    // Runs the plan of a token n times, or 0 times after read(), and reads what was drawn: [{token, top}, ...].
    const draw = async (plan, n) => {
      const count = Math.max(1, n), before = offset;
      const size = told.reduce((sum, [, bytes]) => sum + bytes, 4);
      const staging = gpu.device.createBuffer({ size: size * count, usage: GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ });
      for (let i = 0; i < count; i++) {  // each is submitted by itself, and computed while the next one is encoded
        const encoder = gpu.device.createCommandEncoder();
        if (n) plan.encode(encoder);
        encoder.copyBufferToBuffer(drawn, 4 * ((steps + i) % 8), staging, size * i, 4);
        told.forEach(([buffer, bytes], part) => encoder.copyBufferToBuffer(buffer, 0, staging, size * i + 4 + 64 * part, bytes));
        gpu.device.queue.submit([encoder.finish()]);
      }
      await staging.mapAsync(GPUMapMode.READ);
      const bytes = staging.getMappedRange().slice(0);
      staging.destroy();
      const five = (values) => Array.from({ length: 5 }, (_, place) => [values[place], values[5 + place]]);
      return Array.from({ length: count }, (_, i) => {
        const [token] = new Uint32Array(bytes, size * i, 1);
        const context = before + (n ? i + 1 : 0);
        if (!probabilities) return { token, top: null, context };
        const values = new Float32Array(bytes, size * i + 4, size / 4 - 1), found = { token, top: five(values), context };
        return changes ? { ...found, unchanged: five(values.subarray(16)), divergence: values[32] } : found;
      });
    };
    const coming = [];
    let burst = 1;
    while ((coming.length || steps < max_new_tokens) && !signal?.aborted) {
      while (coming.length < AHEAD && steps < max_new_tokens) {
        const again = offset === block_size;
        if (again && coming.length) break;  // first all tokens must be known
        let n = 0;
        if (steps === 0) await read(history);
        else if (again) await read(history.slice(-Math.max(1, Math.floor(block_size / 2))));
        else n = Math.min(burst, max_new_tokens - steps, block_size - offset);
        coming.push(draw(n ? await ready(1, true) : null, n));  // a new plan if chooseKernels() has changed gpu.paths meanwhile
        coming.at(-1).catch(() => {});  // if the device is lost, awaiting the next one will throw
        offset += n;
        steps += Math.max(1, n);
      }
      const waits = performance.now(), tokens = await coming.shift();
      burst = Math.max(1, Math.min(BURST, Math.floor(FRAME * tokens.length / (performance.now() - waits))));
      history.push(...tokens.map(({ token }) => token));
      for (const each of tokens) {
        if (signal?.aborted) break;
        yield each;
      }
    }
    await Promise.all(coming);
  }
}

/** What a generation keeps on the device: its caches, its position, the tokens that it has drawn, and its plans. changes: of
 *  steer.js, which act while it writes; with them the unchanged model reads the text too. */
export class Writer {
  constructor(model, changes = null) {
    const { gpu, config: { n_layer, block_size, n_kv_head, head_dim } } = model, made = [], layers = Array.from({ length: n_layer });
    const own = (size) => (made.push(gpu.buffer(size)), made.at(-1)), runs = changes ? [0, 1] : [0];
    if (model.config.yoco) layers.length = halfOf(model.config) + 1;  // yoco
    const width = 4 * n_kv_head * head_dim, rows = () => layers.map(() => own(block_size * width));  // bytes of a token's keys
    gpu.checkSize(block_size * width, `open the page with ?context=${Math.floor(gpu.largest / width)}`);
    Object.assign(this, { changes, made, plans: new Map(), caches: runs.map(() => ({ k: rows(), v: rows() })), tops: runs.map(() => own(64)),
      at: own(16), token: own(4 * CHUNKS.at(-1)), last: own(4), drawn: own(4 * 8), divergence: own(4) });
    for (const cache of this.caches) cache.taken = layers.map((_, layer) => skips(model.config, layer) && own(4 * block_size));  // mod
  }

  destroy() {
    this.plans.forEach(({ plan }) => plan.destroy());
    this.made.forEach((buffer) => buffer.destroy());
    this.changes?.destroy();
  }
}

// ---- weights --------------------------------------------------------------------------------------------------------

async function readWeights(gpu, blob, config, tensors, weights, keep, onProgress) {
  const wrong = (path, why) => new UserError(`${blob.name ?? "This file"}: ${path} ${why}. The checkpoint is damaged, or another program wrote it.`);
  const same = (a, b) => a.length === b.length && a.every((n, i) => n === b[i]);
  const used = new Set();
  let expected = parametersOf(config), done = 0;
  expected = withFactors(expected, tensors);  // laser
  const get = async (name, shape, dtypes) => {
    const entry = tensors.get(name);
    if (!entry) throw wrong(name, "is missing");
    if (!same(entry.shape, shape)) throw wrong(name, `has the shape ${entry.shape.join(" x ")} instead of ${shape.join(" x ")}`);
    if (!dtypes.includes(entry.dtype)) throw wrong(name, `is of the type ${entry.dtype}`);
    used.add(name);
    const bytes = await readTensor(blob, entry);
    done += entry.end - entry.start;
    onProgress(Math.min(1, done / blob.size));
    return { dtype: entry.dtype, bytes };
  };
  const finite = (name, numbers) => {
    if (!allFinite(numbers)) throw wrong(name, "holds infinite numbers or NaN");
    return numbers;
  };
  const floats = async (name, shape) => {
    const { dtype, bytes } = await get(name, shape, ["F32", "F16", "BF16"]);
    return finite(name, toFloat32(bytes, dtype));
  };
  const columns = async (name, shape) => {  // see ordered() in gpu.js  // actorder
    const found = new Uint32Array((await get(name, shape, ["I32"])).bytes);  // actorder
    if (found.some((column) => column >= shape.at(-1))) throw wrong(name, "names columns that are not there");  // actorder
    return found;  // actorder
  };  // actorder
  for (const [name, shape] of expected) {
    const path = name.replace(/\.(weight|bias)$/, "");
    if (name.endsWith(".bias") || shape.length === 1 || path === "pos_embed") {
      const buffer = keep(await floats(name, shape));
      if (name.endsWith(".bias")) weights.get(path).bias = buffer;
      else weights.set(path, { buffer, rows: shape[0], width: shape[1] });
      continue;
    }
    const width = shape.at(-1), lead = shape.slice(0, -1), rows = lead.reduce((a, b) => a * b), scales = tensors.get(`${path}.scales`);
    const matrix = (format, contents) => {
      if (lead.length > 1) gpu.checkSize(contents.buffer.byteLength, "this page cannot divide the experts of a layer");  // moe
      return gpu.matrix(format, contents, keep);
    };
    if (!scales) {
      const { dtype, bytes } = await get(name, shape, ["F32", "F16", "BF16"]);
      const half = dtype === "F16", numbers = half ? new Uint16Array(bytes) : toFloat32(bytes, dtype);
      weights.set(path, matrix({ rows, width, bits: half ? 16 : 32 }, { buffer: finite(name, numbers) }));
      continue;
    }
    const bits = tensors.get(name)?.shape.at(-1) * 32 / width, group = width / scales.shape.at(-1);
    if (![2, 3, 4, 5, 6, 8].includes(bits) || ![32, 64, 128].includes(group)) throw wrong(name, "is quantized in a way that this page does not know");
    const { bytes } = await get(name, [...lead, width * bits / 32], ["U32"]);
    const affine = [];
    for (const part of ["scales", "biases"]) {
      const { dtype, bytes } = await get(`${path}.${part}`, [...lead, width / group], ["F32", "F16", "BF16"]);
      affine.push(finite(`${path}.${part}`, scales.dtype === "F16" && dtype === "F16" ? new Uint16Array(bytes) : toFloat32(bytes, dtype)));
    }
    weights.set(path, matrix({ rows, width, bits, group, scaleBits: scales.dtype === "F16" ? 16 : 32 },
      { buffer: new Uint32Array(bytes), scales: affine[0], biases: affine[1] }));
    if (tensors.has(`${path}.order`)) weights.get(path).order = keep(await columns(`${path}.order`, [...lead.slice(0, -1), width]));  // actorder
  }
  joinFactors(weights);  // laser
  if (config.diff_attn) await readLambdas(config, weights, floats, keep);  // diff
  const more = [...tensors.keys()].find((name) => !used.has(name));
  if (more) throw wrong(more, "has no place in the architecture of its settings");
  return expected;
}

// ---- variant laser: matrices that are stored as two factors, see factors() in gpu.js ----

/** The shapes of parametersOf() with, for each matrix W (rows, width) that the file stores as W = u v, those of u and v. */
function withFactors(shapes, tensors) {
  return new Map([...shapes].flatMap(([name, shape]) => {
    const path = name.slice(0, name.lastIndexOf(".")), v = tensors.get(`${path}.v.scales`) ?? tensors.get(`${path}.v.weight`);
    if (!tensors.has(`${path}.u.weight`) || v?.shape.length !== 2 || path.endsWith("embed")) return [[name, shape]];
    if (name.endsWith(".bias")) return [[`${path}.u.bias`, shape]];
    return [[`${path}.v.weight`, [v.shape[0], shape[1]]], [`${path}.u.weight`, [shape[0], v.shape[0]]]];
  }));
}

function joinFactors(weights) {
  for (const [path, v] of [...weights].filter(([path]) => path.endsWith(".v") && weights.has(path.replace(/v$/, "u")))) {
    const u = weights.get(path.replace(/v$/, "u")), { rows, bits, group, bias } = u;
    weights.set(path.slice(0, -2), { rows, width: v.width, bits, group, bias, u, v });
  }
}

// ---- end of laser ----

/** The i-th part of a buffer of parts with these sizes in bytes. */
function part(buffer, sizes, i) {
  return { buffer, offset: sizes.slice(0, i).reduce((a, b) => a + b, 0), size: sizes[i] };
}

/** Put matrices that multiply the same numbers into one matrix, `path`, of which they become parts: for one token, one
 *  kernel then computes all their products. They stay apart if they differ in format, or are not whole buffers, or if a
 *  part would not begin at a multiple of 256 bytes. */
function join(gpu, weights, made, path, paths) {
  const all = paths.map((each) => weights.get(each)), [first] = all;
  if (all.some((each) => !each)) return;
  if (all.some((each) => each.slices)) return;
  if (all.some((each) => each.u)) return;  // laser
  if (all.some((each) => each.order)) return;  // actorder
  const kinds = ["buffer", "scales", "biases", "bias"].filter((kind) => first[kind]);
  const alike = all.every((each) => ["width", "bits", "group", "scaleBits"].every((name) => each[name] === first[name]) &&
    Boolean(each.bias) === Boolean(first.bias) && kinds.every((kind) => made.includes(each[kind]) && each[kind].size % 256 === 0));
  const bytes = (kind) => all.reduce((sum, each) => sum + each[kind].size, 0);
  if (!alike || bytes("buffer") > gpu.largest) return;
  const joined = { ...first, rows: all.reduce((sum, { rows }) => sum + rows, 0) }, encoder = gpu.device.createCommandEncoder(), old = [];
  for (const kind of kinds) {
    const sizes = all.map((each) => each[kind].size), whole = gpu.buffer(bytes(kind));
    joined[kind] = whole;
    all.forEach((each, i) => {
      const place = part(whole, sizes, i);
      encoder.copyBufferToBuffer(each[kind], 0, whole, place.offset, place.size);
      old.push(each[kind]);
      each[kind] = place;
    });
    made.push(whole);
  }
  gpu.device.queue.submit([encoder.finish()]);
  old.forEach((buffer) => {
    made.splice(made.indexOf(buffer), 1);
    buffer.destroy();
  });
  weights.set(path, joined);
}

function allFinite(numbers) {
  if (numbers instanceof Uint16Array) return numbers.every((bits) => (bits & 0x7c00) !== 0x7c00);  // of float16
  return numbers.every(Number.isFinite);
}
