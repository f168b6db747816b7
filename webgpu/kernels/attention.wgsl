// Causal attention with grouped heads: o = softmax(q k^T scale + bias) v, without storing the scores.
//
//   q, o (B T, H, D);  k, v (B S, KV, D);  lse (B T, H): the logarithm of each softmax's sum, for the backward pass
//
// at[0]: the position of the first of the T queries; the keys are those of positions 0 ... at[0] + T - 1. S: rows of k for
// each sequence, T or the size of the cache. window: the number of keys that a query sees, its own included; 0: all.
// slopes (H,): of ALiBi's bias -slope distance; zeros without ALiBi. softcap: q k^T scale becomes softcap tanh(q k^T scale /
// softcap), as in Gemma 2; 0: it does not.
//
// A workgroup computes four queries of a head, which are the components of its vectors. It takes 64 keys at a time: first
// each thread computes the scores of a key, then a column of the weighted sum of v.

override SIZE: u32 = 64;    // threads
override WIDTH: u32 = 256;  // at least D, but not more than needed: shared memory is zeroed at the start
// Value heads that are joined: an even head and its neighbour are one of 2 D columns, which o has too; WIDTH is over these.  // diff
override JOINED: u32 = 1;  // diff

struct Params { T: u32, S: u32, H: u32, KV: u32, D: u32, window: u32, scale: f32, softcap: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> slopes: array<f32>;
@group(0) @binding(3) var<storage, read> q: array<f32>;
@group(0) @binding(4) var<storage, read> k: array<f32>;
@group(0) @binding(5) var<storage, read> v: array<f32>;
@group(0) @binding(6) var<storage, read_write> o: array<f32>;
@group(0) @binding(7) var<storage, read_write> lse: array<f32>;

const LOWEST = -1e30;
var<workgroup> queries: array<vec4<f32>, WIDTH>;  // by column
var<workgroup> sums: array<vec4<f32>, WIDTH>;
var<workgroup> weights: array<vec4<f32>, 64>;     // by key; at first its scores

fn bounded(score: vec4<f32>) -> vec4<f32> {
  if (p.softcap == 0) { return score; }
  let e = exp(-2 * abs(score) / p.softcap);  // WGSL's own tanh may be wrong by 1e-5
  return sign(score) * p.softcap * (1 - e) / (1 + e);
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let first = group.x * 4;
  let head = group.y;
  let row = group.z * p.T + first;         // of the first query
  let keys = group.z * p.S;                // row of the first key
  let key_head = head / (p.H / p.KV);
  var value_head = key_head;
  var width = p.D;                         // of a value
  value_head -= key_head % JOINED;  // diff
  width *= JOINED;  // diff
  let n = min(4u, p.T - first);
  for (var c = thread; c < p.D; c += SIZE) {
    var four = vec4(0.0);
    for (var r = 0u; r < n; r++) { four[r] = q[((row + r) * p.H + head) * p.D + c]; }
    queries[c] = four;
  }
  for (var c = thread; c < width; c += SIZE) { sums[c] = vec4(0.0); }
  workgroupBarrier();
  let places = vec4(at[0] + first) + vec4(0u, 1, 2, 3);
  let end = at[0] + first + n;
  var start = 0u;
  if (p.window > 0 && places.x + 1 > p.window) { start = places.x + 1 - p.window; }
  var highest = vec4(LOWEST);
  var sum = vec4(0.0);                     // of the weights that this thread has computed
  for (var base = start; base < end; base += 64) {
    let count = min(64u, end - base);
    for (var i = thread; i < count; i += SIZE) {
      let k_start = ((keys + base + i) * p.KV + key_head) * p.D;
      var product = vec4(0.0);
      for (var c = 0u; c < p.D; c++) { product += queries[c] * k[k_start + c]; }
      let distance = vec4<i32>(places) - i32(base + i);
      var seen = distance >= vec4(0);
      if (p.window > 0) { seen = seen & (distance < vec4(i32(p.window))); }
      weights[i] = select(vec4(LOWEST), bounded(product * p.scale) - slopes[head] * vec4<f32>(distance), seen);
    }
    workgroupBarrier();
    var top = highest;
    for (var i = 0u; i < count; i++) { top = max(top, weights[i]); }
    workgroupBarrier();
    let shrink = exp(highest - top);
    highest = top;
    sum *= shrink;
    for (var i = thread; i < count; i += SIZE) {
      let weight = select(vec4(0.0), exp(weights[i] - top), weights[i] > vec4(LOWEST));
      weights[i] = weight;
      sum += weight;
    }
    workgroupBarrier();
    for (var c = thread; c < width; c += SIZE) {
      var column = sums[c] * shrink;
      var v_at = ((keys + base) * p.KV + value_head) * p.D + c;
      for (var i = 0u; i < count; i++) {
        column += weights[i] * v[v_at];
        v_at += p.KV * p.D;
      }
      sums[c] = column;
    }
    workgroupBarrier();
  }
  weights[thread] = sum;
  workgroupBarrier();
  var total = vec4(0.0);
  for (var i = 0u; i < SIZE; i++) { total += weights[i]; }
  for (var r = 0u; r < n; r++) {
    let o_at = ((row + r) * p.H + head) * width;
    for (var c = thread; c < width; c += SIZE) { o[o_at + c] = sums[c][r] / total[r]; }
    if (thread == 0) { lse[(row + r) * p.H + head] = highest[r] + log(total[r]); }
  }
}
