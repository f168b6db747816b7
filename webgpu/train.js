// Training: forward pass, backward pass, clipping and AdamW on the device, as train.py --optimizer=adamw does them.
//
//   const trainer = await Trainer.create(gpu, { model, text });        // or { config, tokenizer, text }: from scratch
//   while (trainer.updates < 500) show(await trainer.step());
//   const { checkpoint, optimizer } = await trainer.save();            // what train.py --resume=True takes
//
// All parameters are in one buffer, matrices first; another one holds their gradients, and a third their two moments.

import { UserError } from "./errors.js";
import { Plan } from "./gpu.js";
import { configOf, GPT, KINDS, parametersOf } from "./gpt.js";
import { readHeader, readTensor, toFloat32, writeSafetensors } from "./safetensors.js";
import { sinkGradient } from "./sinks.js";  // sinks
import { Tokenizer } from "./tokenizer.js";

const DEFAULTS = { batch_size: 8, learning_rate: 3e-3, max_iters: 500, weight_decay: 0.1, grad_clip: 1, warmup_iters: 20, min_lr: 0.1,
  beta1: 0.9, beta2: 0.95, seed: 1337 };
const UNTRAINED = [  // settings whose backward pass the page does not have
  "attn_softcap",
  "n_expert",  // moe
  "mod",  // mod
  "sinks",  // sinks
  "diff_attn",  // diff
  "yoco",  // yoco
  "value_residual",  // resformer
  "value_embeds",  // valembed
];
const LINES = 1024;  // workgroups of a long sum: enough for a large card
const LOGITS = 2 ** 25;  // that are in memory at a time: as many as a buffer may have on every device

/** The tokens of a window where the open model is trained further, whose context may be longer than a text fills. */
export const windowOf = ({ block_size }) => Math.min(block_size, 512);

export class Trainer {
  /** model: a GPT to start from (quantized weights are unpacked); or config and tokenizer, to start from random weights.
   *  text: to learn from, or ids, its tokens; the last tenth is held out. resume: {checkpoint, optimizer}, files of save().
   *  settings: see DEFAULTS. */
  static async create(gpu, { model, config, tokenizer, text, ids, resume, makeRoom, ...settings }) {
    const trainer = new Trainer();
    const blob = resume?.checkpoint ?? model?.blob;
    const { meta } = blob ? await readHeader(blob) : { meta: { config, tokenizer } };
    if (resume && meta.script !== "train.py") throw new UserError("This checkpoint is not from a training run: its training cannot go on.");
    const architecture = configOf(meta.config);
    const untrained = UNTRAINED.find((name) => ![undefined, false, 0, "none"].includes(architecture[name]));
    if (untrained) throw new UserError(`This model has ${untrained}, with which this page cannot train: python train.py --init can.`);
    if (model && !resume) architecture.block_size = windowOf(architecture);  // the new model's context, as with train.py --init
    if (!meta.tokenizer) throw new UserError("This checkpoint holds no tokenizer: it cannot read a text.");
    Object.assign(trainer, { gpu, meta, config: architecture, settings: { ...DEFAULTS, ...(resume && meta.settings), ...settings } });
    trainer.updates = resume ? meta.step : 0;
    trainer.losses = { train: null, val: null, bits_per_byte: null, best_val: null, ...(resume && meta.losses) };
    trainer.enc = new Tokenizer(meta.tokenizer);
    trainer.split(ids ?? trainer.enc.encode(text));
    makeRoom?.();
    try {
      await gpu.guard(async () => {
        await trainer.layOut(blob, resume?.optimizer);
        await trainer.build();
      });
    } catch (error) {
      trainer.destroy();
      throw error;
    }
    return trainer;
  }

  /** Split token ids into those to learn from and those held out for evaluation. */
  split(ids) {
    const T = this.config.block_size, part = Math.max(T + 1, Math.ceil(ids.length / 10));
    if (ids.length < 2 * (T + 1) + 2) {
      throw new UserError(`The text has ${ids.length} tokens, and windows of ${T} need at least ${2 * (T + 1) + 2}: ` +
        "give a longer text, or a shorter context.");
    }
    this.tokens = ids.slice(0, ids.length - part);
    this.held_out = ids.slice(ids.length - part);
  }

  // ---- parameters ---------------------------------------------------------------------------------------------------

  /** Lay the parameters out in one buffer (places: name -> {shape, at, size}), with their values and moments at the start. */
  async layOut(blob, optimizer) {
    const shapes = [...parametersOf(this.config)];
    shapes.sort(([, a], [, b]) => b.length - a.length);  // matrices first; else in order
    this.places = new Map();
    let at = 0;
    for (const [name, shape] of shapes) {
      if (shape.length === 1) this.decayed ??= at;
      const size = shape.reduce((a, b) => a * b);
      this.places.set(name, { shape, at, size });
      at += Math.ceil(size / 64) * 64;  // a buffer can be bound only at multiples of 256 bytes
    }
    this.n = at;
    this.gpu.checkSize(8 * at);  // that of the moments, before a large model is read
    const values = new Float32Array(at), moments = new Float32Array(2 * at);
    if (blob) await readDense(blob, this.places, values);
    else initialize(this.config, this.places, values, this.settings.seed);
    if (optimizer) {
      const { tensors } = await readHeader(optimizer);
      for (const [name, { at: place, size }] of this.places) {
        for (const [i, moment] of ["m", "v"].entries()) {
          const entry = tensors.get(`${name}.${moment}`);
          if (entry?.end - entry?.start !== 4 * size) throw new UserError("The optimizer's file does not belong to this checkpoint.");
          moments.set(new Float32Array(await readTensor(optimizer, entry)), i * at + place);
        }
      }
    }
    this.made = [];
    const own = (content) => (this.made.push(this.gpu.buffer(content)), this.made.at(-1));
    Object.assign(this, { values: own(values), gradients: own(4 * at), moments: own(moments), parts: own(4 * LINES), now: own(16), squares: own(16) });
    const inside = (name, buffer) => {
      const { at: place, size } = this.places.get(name);
      return { buffer, offset: 4 * place, size: 4 * Math.ceil(size / 64) * 64 };
    };
    const weights = new Map();
    for (const [name, { shape }] of this.places) {
      const path = name.slice(0, name.lastIndexOf("."));
      if (name.endsWith(".bias")) weights.get(path).bias = inside(name, this.values);
      else weights.set(path, { buffer: inside(name, this.values), rows: shape[0], width: shape[1] });
    }
    this.gradient = (name) => this.places.has(name) ? inside(name, this.gradients) : null;
    this.model = new GPT(this.gpu, this.config, weights, { meta: this.meta });
  }

  // ---- the step -----------------------------------------------------------------------------------------------------

  async build() {
    const { gpu, model, settings } = this, { block_size: T, n_embd: C, n_layer } = this.config, B = settings.batch_size, R = B * T;
    const plan = this.plan = new Plan(gpu);
    this.inputs = plan.scratch(4 * R);
    this.targets = plan.scratch(4 * R);
    this.lists = plan.scratch(4 * (3 * R + 2));  // see embed_backward.wgsl
    const at = plan.scratch(Uint32Array.of(0, T)), rooms = Array.from({ length: n_layer }, () => model.room(plan, R));
    const embedded = plan.scratch(4 * R * C), h = plan.scratch(4 * R * C), losses = plan.scratch(4 * R);
    const rows = Math.max(64, Math.floor(LOGITS / this.config.vocab_size / 64) * 64);
    const logits = plan.scratch(4 * Math.min(rows, Math.ceil(R / 64) * 64) * this.config.vocab_size);
    const head = model.head(), head_name = this.config.tie ? "embed.weight" : "head.weight", V = this.config.vocab_size;
    const d = this.d = plan.scratch(4 * R * C), d_h = plan.scratch(4 * R * C);

    const forward = (plan) => model.forward(plan, { B, T, tokens: this.inputs, at, rooms: (layer) => rooms[layer], embedded });
    const addLoss = (plan, x, learn) => {  // the loss, and with `learn` d_h, in chunks of rows: all logits may need too much memory
      model.norm(plan, "norm", x, h, R, C);
      for (let start = 0; start < R; start += rows) {
        const n = Math.min(rows, R - start);
        const part = (buffer, width) => ({ buffer, offset: 4 * start * width, size: 4 * n * width });
        gpu.linear(plan, head, part(h, C), logits, n, { ACCUMULATE: false });
        model.scaled(plan, logits, this.config.logit_scale, n * V);
        plan.add("loss", learn ? {} : { EVALUATE: true }, [n, V, 1 / R, this.config.softcap], [part(this.targets, 1), logits, part(losses, 1)], gpu.groups(n));
        if (learn) {
          model.scaled(plan, logits, this.config.logit_scale, n * V);  // from here on, these are gradients
          this.weightGradient(plan, part(h, C), logits, head_name, n, start > 0);
          this.inputGradient(plan, head, logits, part(d_h, C), n);
        }
      }
      plan.add("column_sum", {}, [R, 1], [gpu.none, losses, gpu.none, this.loss], [1]);
    };
    this.loss = plan.scratch(16);
    const x = forward(plan);
    addLoss(plan, x, true);
    this.backward(plan, { B, T, R, at, rooms, embedded, x, d, d_h });
    plan.add("sum_squares", {}, [this.n], [this.gradients, this.parts], [LINES]);
    plan.add("column_sum", {}, [LINES, 1], [gpu.none, this.parts, gpu.none, this.squares], [1]);
    plan.add("adamw", {}, [this.n, this.decayed ?? this.n, settings.grad_clip, settings.weight_decay, settings.beta1, settings.beta2],
      [this.now, this.squares, this.gradients, this.moments, this.values], gpu.threads(this.n));
    await plan.ready();

    this.evaluation = new Plan(gpu);
    addLoss(this.evaluation, forward(this.evaluation), false);
    await this.evaluation.ready();
  }

  /** dW = dy^T x of a matrix, and the gradient of its bias. more: add dW to the buffer's contents. */
  weightGradient(plan, x, dy, name, R, more = false) {
    const { shape: [rows, width] } = this.places.get(name), bias = this.gradient(name.replace("weight", "bias"));
    this.gpu.linear(plan, { buffer: x, rows, width }, dy, this.gradient(name), rows,
      { TRANSPOSE_X: true, TRANSPOSE_W: true, ACCUMULATE: more, N: width, K: R });
    if (bias) this.columnSum(plan, dy, bias, R, rows, { more });
  }

  /** dx = dy W, or with `more` dx += dy W. */
  inputGradient(plan, weight, dy, dx, R, more = false) {
    this.gpu.linear(plan, weight, dy, dx, R, { TRANSPOSE_W: true, ACCUMULATE: more, N: weight.width, K: weight.rows });
  }

  /** The sums (C,) over the rows of dy (R, C); with `more` they are added to what is there. x, statistics: see
   *  column_sum.wgsl. */
  columnSum(plan, dy, sums, R, C, { x = null, statistics = null, more = false } = {}) {
    const { gpu } = this, columns = Math.ceil(C / 16), lines = Math.min(Math.ceil(LINES / columns), Math.ceil(R / 64));
    const parts = plan.spare("column sums", 4 * lines * C);
    plan.add("column_sum", x ? { NORM: true } : {}, [R, C], [x ?? gpu.none, dy, statistics ?? gpu.none, parts], [columns, lines]);
    gpu.sumParts(plan, parts, lines, sums, C, more);
  }

  /** The gradient dx of a norm's input, which with `more` is added to dx, and those of its weight and bias. */
  normGradient(plan, path, x, dy, dx, R, C, more) {
    const { gpu } = this, LAYER = this.config.norm === "layer" && !/[qk]_norm$/.test(path);
    const statistics = this.statistics[R] ??= plan.scratch(8 * R), bias = this.gradient(`${path}.bias`);
    plan.add("norm_backward", { ...(LAYER && { LAYER }), ...(more && { ADD: true }) }, [R, C, this.config.norm_eps],
      [this.model.weights.get(path).buffer, x, dy, dx, statistics], gpu.groups(R));
    this.columnSum(plan, dy, this.gradient(`${path}.weight`), R, C, { x, statistics });
    if (bias) this.columnSum(plan, dy, bias, R, C);
  }

  /** Add the steps of the backward pass, from d_h, the gradient of the last norm's output. x: the stream after the last
   *  block. */
  backward(plan, { B, T, R, at, rooms, embedded, x, d, d_h }) {
    const { gpu, model, config } = this, { n_embd: C, n_head: H, n_kv_head: KV, head_dim: D, ffn_dim: F, n_layer } = config;
    const weight = (path) => model.weights.get(path), size = (width) => plan.scratch(4 * R * width);
    const [d_act, d_gate, d_o, d_q, d_k, d_v] = [F, F, H * D, H * D, KV * D, KV * D].map(size);
    const [d_q2, d_k2] = config.qk_norm || config.pos === "rope" ? [H * D, KV * D].map(size) : [];
    const { parallel, norm_place, residual_scale, qk_norm_width } = config, after = norm_place !== "before";
    const [d_y, d_normed, d_h2] = [after || residual_scale !== 1, after, parallel].map((needed) => needed ? size(C) : null);
    // The gradient of what attention or MLP computes, from d, that of what is added to the stream.
    const leaving = (path, y) => {
      if (!d_y) return d;
      plan.copy(d, 0, d_y, 0, 4 * R * C);
      model.scaled(plan, d_y, residual_scale, R * C);
      if (after) this.normGradient(plan, `${path}_post_norm`, y, d_y, d_normed, R, C, false);
      return after ? d_normed : d_y;
    };
    // Adds the gradient d_h of the input of attention or MLP, which is that of a norm of x, or that of x.
    const entering = (path, x, d_h) => {
      if (norm_place === "after") model.add(plan, d, d_h, R * C);
      else this.normGradient(plan, `${path}_norm`, x, d_h, d, R, C, true);
    };
    this.statistics = {};
    this.normGradient(plan, "norm", x, d_h, d, R, C, false);
    for (let layer = n_layer - 1; layer >= 0; layer--) {
      const room = rooms[layer], path = `blocks.${layer}`, entered = layer ? rooms[layer - 1].mlp : embedded;
      const [h, h2] = norm_place !== "after" ? [room.h, room.h2] : [entered, parallel ? entered : room.attn];
      // the MLP: d is the gradient of the block's output
      const d_mlp = leaving(`${path}.mlp`, room.mlp_y), d_in = d_h2 ?? d_h;
      this.weightGradient(plan, room.act, d_mlp, `${path}.mlp.down.weight`, R);
      this.inputGradient(plan, weight(`${path}.mlp.down`), d_mlp, d_act, R);
      plan.add("activation_backward", { KIND: KINDS[config.mlp] }, [R * F], [room.gate ?? room.up, room.up, d_act, room.gate ? d_gate : gpu.trash], gpu.threads(R * F));
      this.weightGradient(plan, h2, d_act, `${path}.mlp.up.weight`, R);
      this.inputGradient(plan, weight(`${path}.mlp.up`), d_act, d_in, R);
      if (room.gate) {
        this.weightGradient(plan, h2, d_gate, `${path}.mlp.gate.weight`, R);
        this.inputGradient(plan, weight(`${path}.mlp.gate`), d_gate, d_in, R, true);
      }
      if (!parallel) entering(`${path}.mlp`, room.attn, d_in);
      // attention: d is the gradient of the stream after it
      const d_attn = leaving(`${path}.attn`, room.attn_y);
      this.weightGradient(plan, room.o, d_attn, `${path}.attn.out.weight`, R);
      this.inputGradient(plan, weight(`${path}.attn.out`), d_attn, d_o, R);
      if (parallel) entering(`${path}.mlp`, entered, d_in);  // only now, as attention reads d too
      const [q, k] = model.scored(layer, room);
      const uniforms = [T, H, KV, D, model.windowOf(layer), model.scale];
      const [how, size] = gpu.tilesAttention(T, D) ? ["_tiled", 64] : ["", 4], groups = Math.ceil(T / size);
      plan.add(`attention_backward_q${how}`, { WIDTH: D }, uniforms, [model.slopes, q, k, room.v, room.o, d_o, room.lse, d_q], [groups, H, B]);
      plan.add(`attention_backward_kv${how}`, { WIDTH: D }, uniforms, [model.slopes, q, k, room.v, d_o, room.lse, d_k, d_v], [groups, KV, B]);
      if (config.sink_logits) sinkGradient(this, plan, `${path}.attn`, { R, H, lse: room.lse });  // sinks
      let of_q = d_q, of_k = d_k, [free_q, free_k] = [d_q2, d_k2];
      const rotary = model.rotaryOf(layer);
      if (rotary) {
        const undo = (x, y, heads) => plan.add("rope", { UNDO: true }, [R, T, heads, D, rotary], [at, model.turnsOf(layer), x, y], gpu.threads(R * heads * D / 2));
        undo(of_q, free_q, H);
        undo(of_k, free_k, KV);
        [of_q, free_q, of_k, free_k] = [free_q, of_q, free_k, of_k];
      }
      if (config.qk_norm) {
        const sizes = (heads) => qk_norm_width ? [R, heads * D] : [R * heads, D];
        this.normGradient(plan, `${path}.attn.q_norm`, room.q, of_q, free_q, ...sizes(H), false);
        this.normGradient(plan, `${path}.attn.k_norm`, room.k, of_k, free_k, ...sizes(KV), false);
        [of_q, of_k] = [free_q, free_k];
      }
      for (const [name, dy] of [["q", of_q], ["k", of_k], ["v", d_v]]) {
        this.weightGradient(plan, h, dy, `${path}.attn.${name}.weight`, R);
        this.inputGradient(plan, weight(`${path}.attn.${name}`), dy, d_h, R, name !== "q");
      }
      entering(`${path}.attn`, entered, d_h);
    }
    const embed = this.gradient("embed.weight");
    if (!config.tie) plan.add("ablate", {}, [0, config.vocab_size, C, 0, C], [gpu.none, embed], gpu.threads(C));  // set to 0, as a batch has gradients only for its own ids
    if (config.pos === "learned") {
      const rows = Array.from({ length: R }, (_, i) => (i % B) * T + Math.floor(i / B));  // the rows of position 0, then of position 1, ...
      const lists = plan.scratch(Uint32Array.from([T, ...Array.from({ length: T }, (_, t) => t), ...Array.from({ length: T + 1 }, (_, t) => t * B), ...rows]));
      plan.add("embed_backward", { ACCUMULATE: false }, [C, T], [lists, d, this.gradient("pos_embed.weight")], gpu.threads(T * C));
    }
    model.scaled(plan, d, config.embed_scale, R * C);
    plan.add("embed_backward", {}, [C, R], [this.lists, d, embed], gpu.threads(R * C));
  }

  /** Write windows of tokens, by their starts, to `inputs` and `targets`, and the lists of the rows of each id. */
  writeWindows(tokens, starts) {
    const T = this.config.block_size, R = this.settings.batch_size * T, inputs = new Uint32Array(R), targets = new Uint32Array(R);
    starts.forEach((start, b) => {
      inputs.set(tokens.slice(start, start + T), b * T);
      targets.set(tokens.slice(start + 1, start + T + 1), b * T);
    });
    const order = Array.from(inputs.keys()).sort((a, b) => inputs[a] - inputs[b] || a - b);
    const lists = new Uint32Array(3 * R + 2);
    order.forEach((row, i) => {
      if (i === 0 || inputs[row] !== inputs[order[i - 1]]) {
        lists[0] += 1;
        lists[lists[0]] = inputs[row];
        lists[1 + R + lists[0] - 1] = i;
      }
      lists[1 + R + R + 1 + i] = row;
    });
    lists[1 + R + lists[0]] = R;
    this.gpu.write(this.inputs, inputs);
    this.gpu.write(this.targets, targets);
    this.gpu.write(this.lists, lists);
  }

  learningRate(step) {  // the learning rate: train.py's schedule_at times the peak
    const { warmup_iters, max_iters, min_lr, learning_rate } = this.settings;
    if (step < warmup_iters) return learning_rate * (step + 1) / warmup_iters;
    if (step >= max_iters) return learning_rate * min_lr;
    const share = (step - warmup_iters) / Math.max(1, max_iters - warmup_iters);
    return learning_rate * (min_lr + (1 - min_lr) * 0.5 * (1 + Math.cos(Math.PI * share)));
  }

  /** One update: {step, loss, norm, lr}. starts: those of the windows; by default random ones. */
  async step(starts = null) {
    const { batch_size: B, beta1, beta2, seed } = this.settings, R = B * this.config.block_size;
    const random = generator(seed + 7919 * (this.updates + 1)), room = this.tokens.length - this.config.block_size;
    this.writeWindows(this.tokens, starts ?? Array.from({ length: B }, () => Math.floor(random() * room)));
    const lr = this.learningRate(this.updates), step = this.updates += 1;
    this.gpu.write(this.now, Float32Array.of(lr, 1 - beta1 ** step, Math.sqrt(1 - beta2 ** step)));
    this.plan.run();
    const [loss, norm] = await Promise.all([this.gpu.read(this.loss, 4), this.gpu.read(this.squares, 4)]);
    this.losses.train = new Float32Array(loss)[0] / R;
    return { step, loss: this.losses.train, norm: Math.sqrt(new Float32Array(norm)[0]), lr };
  }

  /** Mean loss in nats on windows of the text held out, which are always the same windows. */
  async evaluate() {
    const { batch_size: B } = this.settings, T = this.config.block_size, last = this.held_out.length - T - 1;
    const starts = Array.from({ length: B }, (_, b) => Math.floor(last * b / Math.max(1, B - 1)));
    this.writeWindows(this.held_out, starts);
    this.evaluation.run();
    const loss = new Float32Array(await this.gpu.read(this.loss, 4))[0] / (B * T);
    const specials = new Set(Object.values(this.meta.tokenizer.special));  // special tokens have no bytes
    const bytes = starts.flatMap((start) => [...this.held_out.slice(start + 1, start + T + 1)])
      .reduce((sum, id) => sum + (specials.has(id) ? 0 : this.enc.pieces[id].length), 0);
    const best = Math.min(this.losses.best_val ?? Infinity, loss);
    Object.assign(this.losses, { val: loss, bits_per_byte: loss * B * T / Math.max(1, bytes) / Math.log(2), best_val: best });
    return loss;
  }

  // ---- files --------------------------------------------------------------------------------------------------------

  /** {checkpoint, optimizer, name, optimizerName}: the two files that train.py --resume=True reads from its out_dir, and
   *  their names there. */
  async save() {
    const [values, moments] = (await Promise.all([this.gpu.read(this.values), this.gpu.read(this.moments)])).map((bytes) => new Float32Array(bytes));
    const step = this.updates, weights = new Map(), state = new Map();
    for (const [name, { shape, at, size }] of this.places) {
      weights.set(name, { dtype: "F32", shape, data: values.subarray(at, at + size) });
      state.set(`${name}.m`, { dtype: "F32", shape, data: moments.subarray(at, at + size) });
      state.set(`${name}.v`, { dtype: "F32", shape, data: moments.subarray(this.n + at, this.n + at + size) });
    }
    state.set("step", { dtype: "U64", shape: [], data: BigUint64Array.of(BigInt(step)) });
    state.set("learning_rate", { dtype: "F32", shape: [], data: Float32Array.of(this.learningRate(step)) });
    const { config, losses } = this, { data, ...own } = this.settings;  // data, where a text is, is not known here
    const meta = { version: 1, script: "train.py", commit: "", step, losses, tokenizer: this.meta.tokenizer, config,
      settings: { tokenizer: this.meta.tokenizer.kind, ...own, ...config, optimizer: "adamw", schedule: "cosine", decay_iters: 0, grad_accum: 1 } };
    return { checkpoint: writeSafetensors(weights, meta), name: "ckpt.safetensors",
      optimizer: writeSafetensors(state, { version: 1, step }), optimizerName: `ckpt.optimizer-${step}.safetensors` };
  }

  destroy() {
    [this.plan, this.evaluation].forEach((plan) => plan?.destroy());
    this.model?.destroy();
    this.made?.forEach((buffer) => buffer.destroy());
  }
}

// ---- initial weights ------------------------------------------------------------------------------------------------

/** A function that gives random numbers from 0 to 1, by a seed (mulberry32). */
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** As init_weights of model.py: normal numbers with the same standard deviations. */
function initialize(config, places, values, seed) {
  const random = generator(seed), std = config.n_embd ** -0.5, small = std / Math.sqrt(2 * config.n_layer);
  for (const [name, { shape, at, size }] of places) {
    const module = name.split(".").at(-2);
    if (name.endsWith(".bias")) continue;
    if (name.endsWith(".sink.weight")) continue;  // sinks
    if (shape.length === 1) {
      values.fill(1, at, at + size);
      continue;
    }
    const spread = module === "out" || module === "down" ? small : /embed|head/.test(module) ? 0.02 : std;
    for (let i = at; i < at + size; i++) values[i] = spread * Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  }
}

/** Write a checkpoint's parameters, unpacked, to their places in `values`. */
async function readDense(blob, places, values) {
  const { tensors } = await readHeader(blob);
  for (const [name, { shape, at }] of places) {
    const path = name.slice(0, name.lastIndexOf(".")), scales = tensors.get(`${path}.scales`), entry = tensors.get(name);
    if (!entry) throw new UserError(`${path} is stored as two factors (laser.py --factored=True), with which this page cannot train.`);  // laser
    const bytes = await readTensor(blob, entry);
    if (!scales || name.endsWith(".bias")) {
      values.set(toFloat32(bytes, entry.dtype).subarray(0, shape.reduce((a, b) => a * b)), at);  // of learned positions the first
      continue;
    }
    const [rows, width] = shape, bits = entry.shape[1] * 32 / width, group = width / scales.shape[1], words = new Uint32Array(bytes);
    const [scale, bias] = await Promise.all(["scales", "biases"].map(async (part) => {
      const found = tensors.get(`${path}.${part}`);
      return toFloat32(await readTensor(blob, found), found.dtype);
    }));
    let place = (i) => at + i;
    const order = tensors.get(`${path}.order`), columns = order && new Int32Array(await readTensor(blob, order));  // actorder
    if (order) place = (i) => at + i - i % width + columns[i % width];  // actorder
    for (let i = 0; i < rows * width; i++) {
      const bit = i * bits, word = Math.floor(bit / 32), shift = bit % 32, of = Math.floor(i / group);
      const high = shift + bits > 32 ? words[word + 1] << (32 - shift) : 0;
      values[place(i)] = scale[of] * (((words[word] >>> shift) | high) & (2 ** bits - 1)) + bias[of];
    }
  }
}
