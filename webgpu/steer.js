// Changes inside a model while it writes: parts that are switched off, states that are pasted, and directions that are added
// (activation addition, Turner et al. 2023), as steer.py and patching.py have them.
//
//   const changes = new Changes(model, [off(model, 2, "head 1"), add({ after: 1, state, strength: 4 })]);
//   const writer = new Writer(model, changes);
//   for await (const { token, divergence } of model.generate(ids, { writer, probabilities: true })) ...
//
// A state is that of the residual stream `after` a layer, from -1, the embedding, to n_layer - 1. Positions count from the
// beginning of the text.

import { UserError } from "./errors.js";
import { fingerprint } from "./inside.js";
import { readHeader, readTensor, toFloat32 } from "./safetensors.js";

const EVER = 2 ** 24;  // a position that no text reaches

/** A change that switches a part of a layer off: what the part adds to the stream becomes zero. part: "attn", "mlp", "block"
 *  for both of them, or "head 2". */
export function off(model, layer, part) {
  const { n_embd: C } = model.config, { head_width: D } = model, head = Number(part.match(/^head (\d+)$/)?.[1] ?? NaN), isHead = head >= 0;
  const [left, right] = isHead ? [head * D, head * D + D] : [0, C], sites = isHead ? ["heads"] : part === "block" ? ["attn", "mlp"] : [part];
  return { sites, layer, left, right, state: null, keep: 0, strength: 0, first: 0, last: EVER };
}

/** A change that adds strength times a direction, `state` (C,), to the states after a layer, from the position `first` on. */
export function add(state, { after, strength, first = 0 }) {
  return { sites: ["resid"], layer: after + 1, left: 0, right: state.length, state, keep: 1, strength, first, last: EVER };
}

/** A change that replaces the states after a layer by `state` (C,) at the positions from `first` to `last` - 1. */
export function paste(state, { after, first, last = EVER }) {
  return { sites: ["resid"], layer: after + 1, left: 0, right: state.length, state, keep: 0, strength: 1, first, last };
}

/** Changes on the device, for one generation; all of them act at once, in the order of the list. */
export class Changes {
  constructor(model, list) {
    const { gpu } = model;
    this.gpu = gpu;
    this.dropped = 0;
    this.list = list.map((change) => ({ change, dial: gpu.buffer(16), state: change.state ? gpu.buffer(change.state) : gpu.none }));
  }

  /** The tap for a plan of T rows, whose first position is in the buffer `at`: see forward() in gpt.js. */
  tap(plan, at, T) {
    return (site, layer, x, width) => {
      for (const { change, dial, state } of this.list) {
        const { sites, left, right } = change;
        if (layer !== change.layer || !sites.includes(site)) continue;
        plan.add("steer", change.state ? { STATE: true } : {}, [T, width, left, right], [at, dial, state, x],
          this.gpu.threads(T * (right - left)));
      }
    };
  }

  /** Called before a text is read into an empty cache, without its first tokens: so many are `dropped`. */
  begin(dropped) {
    this.dropped = dropped;
    this.turn();
  }

  /** Send the numbers of all changes to the device, where they act on all tokens that are computed from then on. */
  turn() {
    for (const { change: { keep, strength, first, last }, dial } of this.list) {
      this.gpu.write(dial, Float32Array.of(keep, strength, first - this.dropped, last - this.dropped));
    }
  }

  destroy() {
    for (const { dial, state } of this.list) {
      dial.destroy();
      if (state !== this.gpu.none) state.destroy();
    }
  }
}

/** The states after a layer of a prompt's tokens: an array (C,) for each. */
async function statesOf(model, ids, after) {
  const { n_embd: C } = model.config, size = 4 * ids.length * C;
  const [bytes] = await model.once((plan) => {
    const found = plan.scratch(size);
    model.read(plan, ids, (site, layer, x) => { if (site === "resid" && layer === after + 1) plan.copy(x, 0, found, 0, size); });
    return [[found, size]];
  });
  return Array.from(ids, (_, t) => new Float32Array(bytes, 4 * t * C, C));
}

/** The state (C,) after a layer at a position of a prompt. */
export async function stateOf(model, ids, after, at) {
  return (await statesOf(model, ids, after))[at].slice();
}

/** The difference (C,) of two prompts' states after a layer: of their last tokens; or, with `mean`, of the means over their
 *  tokens without the first `skip`, those that begin every text. */
export async function directionOf(model, positive, negative, after, { mean = false, skip = 0 } = {}) {
  const ends = [];
  for (const ids of [positive, negative]) {
    const kept = (await statesOf(model, ids, after)).slice(mean ? skip : -1);
    if (ids.length <= skip) throw new UserError("A prompt of the direction has no token: type a longer one.");
    ends.push(Float64Array.from(kept[0], (_, c) => kept.reduce((sum, state) => sum + state[c], 0) / kept.length));
  }
  return Float32Array.from(ends[0], (value, c) => value - ends[1][c]);
}

/** The direction that steer.py wrote to a file: {state (C,), after}. UserError if the file belongs to another model. */
export async function loadDirection(model, blob) {
  const { meta, tensors } = await readHeader(blob), name = blob.name ?? "This file";
  const entry = tensors.get("direction"), { n_embd: C, n_layer: L } = model.config;
  if (!meta?.direction || !entry) throw new UserError(`${name} holds no direction: python steer.py --out=FILE writes one.`);
  if (meta.base && model.blob && meta.base !== await fingerprint(model.blob)) {
    throw new UserError(`${name} was made for another checkpoint: make a direction of this one with python steer.py.`);
  }
  const { layer: after } = meta;
  if (entry.shape.join() !== `${C}` || !Number.isInteger(after) || after < -1 || after >= L) {
    throw new UserError(`${name} was made for another checkpoint: its width or its layer is not one of this model.`);
  }
  const state = toFloat32(await readTensor(blob, entry), entry.dtype);
  if (!state.every(Number.isFinite)) throw new UserError(`${name} holds infinite numbers or NaN: make it again with python steer.py.`);
  return { state, after };
}
