// The device: buffers, kernels, and plans, which are lists of dispatches that are built once and run often.
//
//   const gpu = await GPU.open();
//   const plan = new Plan(gpu);
//   plan.add("add", {}, [n], [y, x], gpu.threads(n));      // kernels/add.wgsl: its settings, uniforms, buffers, groups
//   await plan.ready();
//   plan.run();

import { UserError } from "./errors.js";
import { kept, textOf } from "./fetching.js";

const NO_WEBGPU = "This browser has no WebGPU. Chrome and Edge 113 and later have it, Safari 26, and Firefox 141 on " +
  "Windows and macOS; on Linux, Chrome may need chrome://flags/#enable-unsafe-webgpu.";

// All files of kernels/.
const FILES = [
  "ablate act activation activation_backward adamw add attention attention_backward_kv attention_backward_kv_tiled",
  "attention_backward_q attention_backward_q_tiled attention_map attention_one attention_tiled column_sum divergence",
  "dot embed embed_backward enter_cache head_alone loss matmul matmul_tiled matvec matvec_packed matvec_subgroup",
  "maxima norm norm_backward norm_share patch put_columns rope rows sample scale softcap steer sum_parts sum_squares tiles top",
  "vector weights",
  "diff diff_map",  // diff
  "value_mix",  // resformer
  "first_columns value_embed",  // valembed
  "sinks sinks_map sinks_score sink_logits sink_logits_backward",  // sinks
  "columns",  // actorder
  "experts_matmul experts_matvec experts_route experts_sort experts_sum",  // moe
  "depth_attention depth_blank depth_gate depth_leave depth_map",  // mod
].join(" ").split(" ");

const ASKS = 3, BETWEEN = 100;  // Chromium on some machines has no card, or only the processor, when it is first asked

/** The graphics card; a software adapter only where none comes within ASKS; null where there is neither. */
async function askForAdapter() {
  let found = null;
  for (let ask = 1; ask <= ASKS; ask++) {
    const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
    if (adapter && !isSoftware(adapter)) return adapter;
    found = adapter ?? found;
    if (ask < ASKS) await new Promise((resolve) => setTimeout(resolve, BETWEEN));
  }
  return found;
}

const isSoftware = (adapter) => Boolean(adapter.info.isFallbackAdapter ?? adapter.isFallbackAdapter);

// The K columns of a product of tiles, where they are at least DEEP, are divided into parts of at least PART_OF_DEEP, as long as
// it has no more than BUSY workgroups: twice as many as a large card runs at a time.
const BUSY = 500, DEEP = 2048, PART_OF_DEEP = 256;

export class GPU {
  /** Ask for the card before open() needs it, while other files are loaded. */
  static ask() { if (globalThis.navigator?.gpu) GPU.asked = askForAdapter(); }

  static async open() {
    if (!globalThis.navigator?.gpu) throw new UserError(NO_WEBGPU);
    const adapter = await (GPU.asked ?? askForAdapter());
    GPU.asked = null;  // an adapter has one device
    if (!adapter) {
      throw new UserError("This browser has WebGPU, but it found no graphics card. An update of the driver or of the browser " +
        "may help, or turning on hardware acceleration in the browser's settings.");
    }
    const wanted = ["maxBufferSize", "maxStorageBufferBindingSize"];  // as large as the card allows; all other limits stay at their defaults
    const device = await adapter.requestDevice({
      requiredFeatures: ["subgroups", "timestamp-query"].filter((name) => adapter.features.has(name)),
      requiredLimits: Object.fromEntries(wanted.map((name) => [name, adapter.limits[name]])),
    });
    return new GPU(adapter, device);
  }

  constructor(adapter, device) {
    this.device = device;
    const { vendor, architecture, description, subgroupMaxSize } = adapter.info;
    this.info = {
      name: description || [vendor, architecture].filter(Boolean).join(" ") || "an unnamed adapter",
      fallback: isSoftware(adapter),
      limits: { buffer: device.limits.maxBufferSize, binding: device.limits.maxStorageBufferBindingSize },
    };
    this.lanes = subgroupMaxSize || 0;  // the largest number of threads in a subgroup
    this.lost = device.lost.then(({ message }) => message);
    this.errors = [];                   // of validation: each is a bug of this page
    device.onuncapturederror = ({ error }) => {
      this.errors.push(error.message);
      console.error(error.message);
    };
    this.pipelines = new Map();
    this.none = this.buffer(16);        // for a binding that a kernel, with its settings, does not read
    this.trash = this.buffer(16);       // for one that it does not write
    this.paths = { tiles: [], subgroups: false, packed: [] };  // packed: the bits for which it is used; see chooseKernels()
    this.choices = choicesAtStart(this);
  }

  // A storage buffer: content is its size in bytes, or an array, which is copied. UserError beyond the device's limits.
  buffer(content) {
    const size = Math.max(16, Math.ceil((content.byteLength ?? content) / 16) * 16);
    this.checkSize(size);
    const { STORAGE, COPY_SRC, COPY_DST } = GPUBufferUsage;
    const buffer = this.device.createBuffer({ size, usage: STORAGE | COPY_SRC | COPY_DST });
    if (content.byteLength) this.write(buffer, content);
    return buffer;
  }

  // The bytes of the largest buffer that the device allows.
  get largest() { return Math.min(this.info.limits.buffer, this.info.limits.binding); }

  // UserError if a buffer cannot have so many bytes.
  checkSize(size, advice = "take a smaller model, a smaller batch or a shorter context") {
    if (size <= this.largest) return;
    throw new UserError(`This needs a buffer of ${megabytes(size)}, and this graphics card allows ${megabytes(this.largest)}: ` +
      `${advice}.`);
  }

  write(buffer, content, offset = 0) {
    let bytes = new Uint8Array(content.buffer ?? content, content.byteOffset ?? 0, content.byteLength);
    if (bytes.length % 4) {  // WebGPU writes words
      const whole = new Uint8Array(Math.ceil(bytes.length / 4) * 4);
      whole.set(bytes);
      bytes = whole;
    }
    this.device.queue.writeBuffer(buffer, offset, bytes);
  }

  // The bytes of a buffer, once all work that was submitted before is done.
  async read(buffer, size = buffer.size, offset = 0) {
    const { COPY_DST, MAP_READ } = GPUBufferUsage;
    const staging = this.device.createBuffer({ size: Math.ceil(size / 4) * 4, usage: COPY_DST | MAP_READ });
    const encoder = this.device.createCommandEncoder();
    encoder.copyBufferToBuffer(buffer, offset, staging, 0, staging.size);
    this.device.queue.submit([encoder.finish()]);
    await staging.mapAsync(GPUMapMode.READ);
    const bytes = staging.getMappedRange().slice(0, size);
    staging.destroy();
    return bytes;
  }

  // The result of work(). UserError if the device ran out of memory meanwhile.
  async guard(work) {
    this.device.pushErrorScope("out-of-memory");
    let result, failure;
    try {
      result = await work();
    } catch (error) {
      failure = error;
    }
    if (await this.device.popErrorScope()) {
      throw new UserError("The graphics card ran out of memory: take a smaller model, a smaller batch or a shorter context, " +
        "or close other pages that use the card.");
    }
    if (failure) throw failure;
    return result;
  }

  // The number of workgroups for n threads, of which each workgroup has `size`; in two dimensions if it is over 65535.
  threads(n, size = 64) { return this.groups(Math.ceil(n / size)); }

  groups(n) { return n <= 65535 ? [n] : [65535, Math.ceil(n / 65535)]; }

  // The text of a file of kernels, fetched once.
  text(name) { return textOf(`kernels/${name}`); }

  // Fetches the files of all kernels, so that the page needs no server from then on.
  fetchAll() { return Promise.all(FILES.map((name) => this.text(`${name}.wgsl`))); }

  // The code of a file of kernels, after that of the files that its first comment names, as in "(+ FILE FILE)".
  async joined(name) {
    const code = await this.text(name), [start, enable = "", names] = code.match(/^(enable .*;\n)?(?:\/\/ \(\+ (.*)\)\n)?/);
    const parts = await Promise.all(names?.split(" ").map((each) => this.joined(each)) ?? []);
    return enable + parts.join("") + code.slice(start.length);
  }

  // A kernel with its settings (override constants), compiled once.
  kernel(name, settings) {
    return kept(this.pipelines, name + JSON.stringify(settings), () => this.compile(name, settings));
  }

  async compile(name, settings) {
    const code = await this.joined(`${name}.wgsl`);
    const module = this.device.createShaderModule({ code, label: name });
    const constants = Object.fromEntries(Object.entries(settings).map(([key, value]) => [key, Number(value)]));
    if (this.info.fallback && /^override SIZE/m.test(code)) constants.SIZE = 4;  // on a processor, barriers are slow
    return this.device.createComputePipelineAsync({ label: name, layout: "auto", compute: { module, constants } });
  }

  // Whether attention of T queries with heads of width D takes the kernels in tiles.
  tilesAttention(T, D) { return this.paths.tiles.some(({ SIDE }) => SIDE) && T >= 32 && D % 4 === 0 && D <= 128; }

  // Whether vector() can multiply by a matrix, or by undefined, with all its options.
  fuses(weight) {
    if (!weight?.buffer || weight.width % 4) return false;
    if (weight.u) return false;  // laser
    if (weight.order) return false;  // actorder
    return this.paths.subgroups || this.paths.packed.includes(weight.bits ?? 32);
  }

  // y (N,) = W x + bias of one row, and what kernels/vector.wgsl adds to it: with `norm`, the weights {buffer, bias} of a
  // norm, of which LAYER and eps are the settings, x is first normalized; or act(x) is taken, if KIND is given; or the
  // product is added to y.
  vector(plan, weight, x, y, { norm = null, LAYER = false, eps = 0, KIND = null, ACCUMULATE = false } = {}) {
    const { rows: N, width: K, bits = 32 } = weight, { none } = this;
    const settings = { ...formatOf(weight), ...(weight.bias && { BIAS: true }), ...(norm && { NORM: LAYER ? 2 : 1 }),
      ...(KIND !== null && { ACTIVATES: true, KIND }), ...(ACCUMULATE && { ACCUMULATE }) };
    const { packed, subgroups } = this.paths, short = K * bits / 64 < this.lanes;  // some lanes of matvec_packed have no words
    const [name, rows] = packed.includes(bits) && !(short && subgroups) ? ["matvec_packed", 512] : ["matvec_subgroup", 128];  // of 1 lane
    plan.add(name, settings, [N, K, eps], [weight.buffer, weight.scales ?? none, weight.biases ?? none, weight.bias ?? none, x, y,
      norm?.buffer ?? none, norm?.bias ?? none], this.groups(Math.ceil(N * this.lanes / rows)));
  }

  // y (M, N) = x (M, K) W^T + bias, with W (N, K) of a checkpoint. more: settings of matmul.wgsl, and N and K, for other
  // products.
  linear(plan, weight, x, y, M, more = {}) {
    if (weight.u) return this.factors(plan, weight, x, y, M);  // laser
    if (weight.order) x = this.ordered(plan, weight, x, M);  // actorder
    if (weight.slices) return this.slices(plan, weight, x, y, M, more);
    const [N, K] = [more.N ?? weight.rows, more.K ?? weight.width];
    const bias = weight.bias && !more.TRANSPOSE_W ? { BIAS: true } : {};
    const { bits = 32 } = weight, settings = { ...formatOf(weight), ...bias };
    const buffers = [weight.buffer, weight.scales ?? this.none, weight.biases ?? this.none, weight.bias ?? this.none, x, y];
    const plain = !("TRANSPOSE_X" in more || "TRANSPOSE_W" in more || "ACCUMULATE" in more);
    if (M === 1 && plain) {
      if (this.paths.subgroups || this.paths.packed.includes(bits)) this.vector(plan, weight, x, y);
      else plan.add("matvec", settings, [N, K], buffers, this.groups(Math.ceil(N / 4)));
      return;
    }
    for (const name of ["TRANSPOSE_X", "TRANSPOSE_W", "ACCUMULATE"]) if (more[name]) settings[name] = true;
    const SIDE = this.paths.tiles.findLast(({ least, SIDE }) => M * N * K >= least && 2 * M >= SIDE)?.SIDE;
    if (SIDE) this.tiles(plan, SIDE, settings, [M, N, K], buffers);
    else {
      const whole = (M % 4 === 0 || !more.TRANSPOSE_X) && N % 4 === 0 && K % 4 === 0 && { WHOLE: true };
      plan.add("matmul", { ...whole, ...settings }, [M, N, K], buffers, [Math.ceil(N / 32), Math.ceil(M / 32)]);
    }
  }

  // The steps of linear() by tiles of SIDE x SIDE numbers, whose K columns are divided into parts.
  tiles(plan, SIDE, { ACCUMULATE = false, ...more }, [M, N, K], buffers) {
    const groups = [Math.ceil(N / SIDE), Math.ceil(M / SIDE)], y = buffers.at(-1);
    const settings = { SIDE, ...(M % SIDE === 0 && N % SIDE === 0 && K % 16 === 0 && { WHOLE: true }), ...more };
    const PARTS = K < DEEP ? 1 : Math.max(1, Math.floor(Math.min(BUSY / (groups[0] * groups[1]), K / PART_OF_DEEP)));
    if (PARTS === 1) {
      plan.add("matmul_tiled", { ...settings, ...(ACCUMULATE && { ACCUMULATE }) }, [M, N, K], buffers, groups);
    } else {
      const parts = plan.spare("parts", 4 * PARTS * M * N);
      plan.add("matmul_tiled", { ...settings, PARTS }, [M, N, K], [...buffers.slice(0, -1), parts], [...groups, PARTS]);
      this.sumParts(plan, parts, PARTS, y, M * N, ACCUMULATE);
    }
  }

  // y (n,) = the sum of its parts (P, n), which is added to y with ACCUMULATE.
  sumParts(plan, parts, P, y, n, ACCUMULATE) {
    plan.add("sum_parts", ACCUMULATE ? { ACCUMULATE } : {}, [P, n], [parts, y], this.threads(n));
  }

  // y (R, C) = factor E[tokens], and the learned positions from at[0] on of each T tokens: see kernels/embed.wgsl.
  embed(plan, weight, tokens, y, R, { T = R, factor = 1, at = this.none, positions = null } = {}) {
    const settings = { ...formatOf(weight), ...(positions && { LEARNED: true }) }, C = weight.width, { none } = this;
    for (const { buffer, scales, biases, first = 0, rows } of weight.slices ?? [weight]) {
      plan.add("embed", settings, [R, T, C, factor, first, rows],
        [buffer, scales ?? none, biases ?? none, at, tokens, positions ?? none, y], this.threads(R * Math.ceil(C / 4)));
    }
  }

  // ---- matrices beyond the largest buffer, which are held in slices of rows ----

  // A matrix {rows, bits, ...} with its contents {buffer, scales, biases}, arrays that keep() puts into buffers. Each of
  // `slices`, if there are any, is a matrix too, before whose rows stand `first` others.
  matrix(shape, contents, keep) {
    const { rows } = shape, bytes = contents.buffer.byteLength;
    const held = (first, n) => Object.fromEntries(Object.entries(contents).map(([name, array]) =>
      [name, keep(array.subarray(first * array.length / rows, (first + n) * array.length / rows))]));
    if (bytes <= this.largest) return { ...shape, ...held(0, rows) };
    const slices = [], most = Math.max(64, Math.floor(this.largest / bytes * rows / 64) * 64);  // bindings begin at 256 bytes
    for (let first = 0; first < rows; first += most) {
      const n = Math.min(most, rows - first);
      slices.push({ ...shape, rows: n, first, ...held(first, n) });
    }
    return { ...shape, slices };
  }

  // linear() with such a matrix.
  slices(plan, { slices, bias, rows: N }, x, y, M, more) {
    if (more.TRANSPOSE_W) throw new UserError("A matrix beyond this graphics card's largest buffer has no gradients on this page.");
    for (const { first, ...slice } of slices) {
      const here = ({ buffer, offset = 0 }) => ({ buffer, offset: offset + 4 * first, size: 4 * slice.rows });
      const weight = { ...slice, bias: bias && here(bias.buffer ? bias : { buffer: bias }) };
      if (M === 1) this.linear(plan, weight, x, here(y.buffer ? y : { buffer: y }), 1, more);
      else {
        const columns = plan.spare("slice", 4 * M * slice.rows);
        this.linear(plan, weight, x, columns, M, more);
        plan.add("put_columns", {}, [M, slice.rows, N, first], [columns, y], this.threads(M * slice.rows));
      }
    }
  }

  // ---- variant laser: a matrix of low rank that is stored as two factors (laser.py --factored=True) ----
  //
  //   y = u (v x) + bias,   u (N, rank), v (rank, K)

  factors(plan, { u, v, bias }, x, y, M) {
    const between = plan.spare("factors", 4 * M * v.rows);
    this.linear(plan, v, x, between, M);
    this.linear(plan, { ...u, bias }, between, y, M);
  }

  // ---- end of laser ----

  // ---- variant actorder: a packed matrix whose columns stand in the order of GPTQ's groups (gptq_reader.py, act-order) ----
  //
  //   y = x[order] W^T,   order (K,): column j of W is for x[order[j]]

  ordered(plan, { order, width }, x, M) {
    const found = plan.spare("ordered", 4 * M * width);
    plan.add("columns", {}, [M, width], [order, x, found], this.threads(M * width));
    return found;
  }

  // ---- end of actorder ----
}

// The settings of weights.wgsl for a matrix.
const formatOf = ({ bits = 32, group = 64, scaleBits = 16 }) =>
  ({ BITS: bits, ...(bits < 16 && { GROUP: group, SCALE_BITS: scaleBits }) });

export const megabytes = (n) => n < 1e6 ? `${(n / 1e3).toFixed(0)} KB` : `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)} MB`;

// ---- plans ----------------------------------------------------------------------------------------------------------

const PART = 32;  // steps of runInParts(): about two layers

// A list of dispatches and copies, with the buffers that belong to it.
export class Plan {
  constructor(gpu) {
    this.gpu = gpu;
    this.steps = [];
    this.own = [];
    this.spares = new Map();
  }

  // A buffer that is destroyed with the plan.
  scratch(content) {
    const buffer = this.gpu.buffer(content);
    this.own.push(buffer);
    return buffer;
  }

  // A buffer that steps with this purpose share: each of them fills it anew, and the next one reads it.
  spare(purpose, size) {
    const key = `${purpose} ${size}`;
    if (!this.spares.has(key)) this.spares.set(key, this.scratch(size));
    return this.spares.get(key);
  }

  // uniforms: numbers in the order of the kernel's Params. buffers: those of bindings 1, 2, ...: each a buffer, or
  // {buffer, offset, size}. Returns the step, for set().
  add(name, settings, uniforms, buffers, groups) {
    this.steps.push({ name, settings, uniforms, buffers, groups });
    return this.steps.length - 1;
  }

  copy(source, from, target, to, size) { this.steps.push({ copy: [source, from, target, to, size] }); }

  async ready() {
    const { device } = this.gpu;
    const work = this.steps.filter((step) => !step.copy);
    this.uniforms = device.createBuffer({ size: Math.max(256, 256 * work.length), usage: GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST });
    this.own.push(this.uniforms);
    const pipelines = await Promise.all(work.map(({ name, settings }) => this.gpu.kernel(name, settings)));
    const all = new Uint8Array(256 * work.length);
    const layouts = await Promise.all(work.map(({ name }) => this.gpu.text(`${name}.wgsl`)));
    work.forEach((step, i) => {
      step.pipeline = pipelines[i];
      step.floats = floatsOf(layouts[i]);
      step.offset = 256 * i;
      all.set(packed(step.uniforms, step.floats), step.offset);
      const entries = [{ buffer: this.uniforms, offset: step.offset, size: 256 }, ...step.buffers]
        .map((each, binding) => ({ binding, resource: each.buffer ? each : { buffer: each } }));
      step.group = device.createBindGroup({ layout: step.pipeline.getBindGroupLayout(0), entries });
    });
    device.queue.writeBuffer(this.uniforms, 0, all);
    return this;
  }

  // Changes the uniforms of a step, from the next run on.
  set(step, uniforms) {
    const { offset, floats } = this.steps[step];
    this.gpu.device.queue.writeBuffer(this.uniforms, offset, packed(uniforms, floats));
  }

  encode(encoder, steps = this.steps) {
    let pass = null;
    for (const step of steps) {
      if (step.copy) {
        pass?.end();
        pass = null;
        encoder.copyBufferToBuffer(...step.copy);
      } else {
        pass ??= encoder.beginComputePass();
        pass.setPipeline(step.pipeline);
        pass.setBindGroup(0, step.group);
        pass.dispatchWorkgroups(...step.groups);
      }
    }
    pass?.end();
  }

  run(times = 1) {
    const encoder = this.gpu.device.createCommandEncoder();
    for (let i = 0; i < times; i++) this.encode(encoder);
    this.gpu.device.queue.submit([encoder.finish()]);
  }

  // Runs PART steps at a time, and waits for each part, so that the signal can stop the plan between two parts: its reason is
  // then thrown. What is submitted to the device cannot be taken back.
  async runInParts(signal) {
    const { queue } = this.gpu.device;
    for (let start = 0; start < this.steps.length; start += PART) {
      signal.throwIfAborted();
      const encoder = this.gpu.device.createCommandEncoder();
      this.encode(encoder, this.steps.slice(start, start + PART));
      queue.submit([encoder.finish()]);
      await queue.onSubmittedWorkDone();
    }
  }

  destroy() {
    this.own.forEach((buffer) => buffer.destroy());
    this.own = [];
  }
}

// Which members of a kernel's Params are floats.
function floatsOf(code) {
  const [, members] = code.match(/struct Params \{([^}]*)\}/);
  return members.split(",").map((member) => member.includes("f32"));
}

function packed(uniforms, floats) {
  if (uniforms.length !== floats.length) throw new Error(`${uniforms.length} uniforms for ${floats.length}`);
  const view = new DataView(new ArrayBuffer(4 * uniforms.length));
  uniforms.forEach((value, i) => floats[i] ? view.setFloat32(4 * i, value, true) : view.setUint32(4 * i, value, true));
  return new Uint8Array(view.buffer);
}

// ---- faster kernels -------------------------------------------------------------------------------------------------

// The plain kernels run on every device: they compute in float32, without subgroups, within the limits that every device
// has. A faster kernel replaces a plain one if, on this device, it gives the same numbers and takes less time, by the
// measurements of chooseKernels(). Before these, and where a faster kernel fails, the plain ones are used.

const LARGEST_ERROR = 2e-5;  // as a share of the largest number

function choicesAtStart(gpu) {
  const waiting = (name) => ({ name, used: false, reason: "not tried yet" });
  return [
    { name: "float32", used: true, reason: "always: the other kernels are compared with these" },
    { name: "float16 weights", used: true, reason: "always: they are read two to a word, which needs no shader-f16" },
    waiting("tiles in shared memory"), waiting("subgroups"), waiting("packed vectors"),
    { name: "dot4I8", used: false, reason: "left out: it rounds activations to 8 bits" },
    { name: "subgroup matrices", used: false, reason: "left out: browsers have them only as an experiment" },
  ];
}

// The shapes (M, N, K) of y = x W^T in which tiles are raced, by M N K: small products need small tiles, to employ all of a
// large card. A shape's winner is taken for all products from its M N K on.
const SHAPES = [[64, 1024, 1024], [256, 1024, 1024], [1024, 1024, 1024], [1024, 768, 3072], [2048, 2048, 1024]];
const ENOUGH = 25;  // milliseconds of eight products: larger shapes are not raced on a card that is so slow

// Measures the faster kernels against the plain ones, and sets gpu.paths by the result. onStep(gpu.choices) is called after
// each measurement.
export async function chooseKernels(gpu, onStep = () => {}) {
  const told = (name, used, reason) => {
    Object.assign(gpu.choices.find((choice) => choice.name === name), { used, reason });
    onStep(gpu.choices);
  };
  if (gpu.info.fallback) {
    told("tiles in shared memory", false, "left out: it is slow on a processor");
  } else {
    const verdicts = [];
    for (const [M, N, K] of SHAPES) {
      const others = [64, 128].filter((SIDE) => M >= SIDE).map((SIDE) => ["matmul_tiled", { SIDE }]);
      const found = await compare(gpu, "matmul", { M, N, K }, others);
      const best = found.filter(isBetter).sort((a, b) => b.speedup - a.speedup)[0];
      gpu.paths.tiles.push({ least: M * N * K, SIDE: best?.settings.SIDE ?? 0 });
      const took = Math.max(...found.map(({ took }) => took));
      verdicts.push(`${M} x ${N} x ${K}: ` + (best ? `${best.settings.SIDE} x ${best.settings.SIDE}, ${verdict(best)}` : found.map(verdict).join("; ")));
      if (took > ENOUGH) break;
    }
    told("tiles in shared memory", gpu.paths.tiles.some(({ SIDE }) => SIDE), verdicts.join("; "));
  }
  if (!gpu.device.features.has("subgroups")) {
    told("subgroups", false, "this device, or this browser, has no subgroups");
    told("packed vectors", false, "left out: it needs subgroups");
    return;
  }
  const side = gpu.info.fallback ? 512 : 2048, [M, N, K] = [1, side, side];
  const [row] = await compare(gpu, "matvec", { M, N, K }, [["matvec_subgroup", {}, gpu.groups(Math.ceil(N * gpu.lanes / 128))]]);
  gpu.paths.subgroups = isBetter(row);
  told("subgroups", gpu.paths.subgroups, verdict(row));
  const both = [];  // of 4 bits, and of 8
  for (const BITS of [4, 8]) {
    both.push(...await compare(gpu, "matvec", { M, N, K, BITS }, [["matvec_packed", {}, gpu.groups(Math.ceil(N * gpu.lanes / 512))]]));
  }
  gpu.paths.packed = [4, 8].filter((_, i) => isBetter(both[i]));
  told("packed vectors", gpu.paths.packed.length > 0, both.map((found, i) => `${[4, 8][i]} bits: ${verdict(found)}`).join("; "));
}

const isBetter = ({ error, speedup, clear }) => error < LARGEST_ERROR && speedup > 1 && clear;

const verdict = ({ error, speedup, clear }) => error < LARGEST_ERROR
  ? `error ${error.toExponential(0)}, ${speedup.toFixed(1)} times as fast${clear ? "" : ", which is within the spread"}`
  : `dropped: error ${error.toExponential(0)}`;

// A clock of a browser may tick ten times in a millisecond, and a submission takes a part of one: a run has work for LEAST
// milliseconds. All kernels run in turn, until the middle halves of their times are apart.
const LEAST = 10, ROUNDS = [4, 12];

// Runs a plain kernel and the kernels that could replace it on random numbers: {settings, error, speedup, clear, took} of each
// of the others. clear: whether its time differs from the plain kernel's by more than both vary. took: milliseconds of eight
// of the plain kernel's products.
async function compare(gpu, name, { M, N, K, BITS = 32 }, others) {
  const random = (n) => new Float32Array(n).map(() => Math.random() - 0.5);  // from() takes ten times as long
  const words = (n) => new Uint32Array(n).map(() => Math.random() * 2 ** 32);
  const own = [];
  const make = (content) => (own.push(gpu.buffer(content)), own.at(-1));
  const W = make(BITS === 32 ? random(N * K) : words(N * K * BITS / 32));
  const affine = BITS === 32 ? gpu.none : make(random(N * K / 64));
  const x = make(random(M * K));
  const uniforms = name === "matvec" ? [N, K] : [M, N, K];
  const groups = name === "matvec" ? gpu.groups(Math.ceil(N / 4)) : [Math.ceil(N / 32), Math.ceil(M / 32)];
  const base = BITS === 32 ? {} : { BITS, SCALE_BITS: 32 };
  const runners = [];
  for (const [kernel, settings, own_groups] of [[name, {}, groups], ...others]) {
    const result = make(4 * M * N), plan = new Plan(gpu);
    const buffers = [W, affine, affine, gpu.none, x, result];
    for (let i = 0; i < 8; i++) {
      if (kernel === "matmul_tiled") gpu.tiles(plan, settings.SIDE, base, uniforms, buffers);
      else if (/^matvec_/.test(kernel)) plan.add(kernel, base, [N, K, 0], [...buffers, gpu.none, gpu.none], own_groups);  // see vector()
      else plan.add(kernel, { ...base, ...settings }, uniforms, buffers, own_groups);
    }
    await plan.ready();
    runners.push({ settings, plan, times: [], result });
  }
  const time = async (plan, times) => {
    const began = performance.now();
    plan.run(times);
    await gpu.device.queue.onSubmittedWorkDone();
    return performance.now() - began;
  };
  for (const { plan } of runners) await time(plan, 1);  // the first run of a kernel takes longer
  let times = 1;
  while (await time(runners[0].plan, times) < (gpu.info.fallback ? 1 : LEAST) && times < 1024) times *= 2;
  const middle = (all) => [0.25, 0.5, 0.75].map((share) => [...all].sort((a, b) => a - b)[Math.floor(share * all.length)]);
  const [plain, ...rest] = runners;
  const apart = ({ times }) => {
    const [low, , high] = middle(times), [plain_low, , plain_high] = middle(plain.times);
    return high < plain_low || low > plain_high;
  };
  for (let round = 1; round <= ROUNDS[1] && !(round > ROUNDS[0] && rest.every(apart)); round++) {
    for (const runner of runners) runner.times.push(await time(runner.plan, times));
  }
  const numbers = async ({ result }) => new Float32Array(await gpu.read(result));
  const right = await numbers(plain), size = right.reduce((most, value) => Math.max(most, Math.abs(value)), 0), found = [];
  for (const runner of rest) {
    const y = await numbers(runner);
    found.push({ settings: runner.settings, clear: apart(runner), took: middle(plain.times)[1] / times,
      speedup: middle(plain.times)[1] / middle(runner.times)[1],
      error: y.reduce((most, value, i) => Math.max(most, Math.abs(value - right[i])), 0) / size });
  }
  runners.forEach(({ plan }) => plan.destroy());
  own.forEach((buffer) => buffer.destroy());
  return found;
}
