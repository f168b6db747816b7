// attention.wgsl for a routed block: a query sees only keys that are taken, and its own. Shapes, settings and bindings are those
// of attention.wgsl, and taken (B S,): 1 for a token that was chosen, 0 for another.
//
// A workgroup computes one query of a head. It takes 64 keys at a time: first each thread computes the scores of a key, then a
// column of the weighted sum of v.

override SIZE: u32 = 64;    // threads
override WIDTH: u32 = 256;  // at least D

struct Params { T: u32, S: u32, H: u32, KV: u32, D: u32, window: u32, scale: f32, softcap: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> slopes: array<f32>;
@group(0) @binding(3) var<storage, read> q: array<f32>;
@group(0) @binding(4) var<storage, read> k: array<f32>;
@group(0) @binding(5) var<storage, read> v: array<f32>;
@group(0) @binding(6) var<storage, read> taken: array<u32>;
@group(0) @binding(7) var<storage, read_write> o: array<f32>;
@group(0) @binding(8) var<storage, read_write> lse: array<f32>;

const LOWEST = -1e30;
var<workgroup> sums: array<f32, WIDTH>;  // by column
var<workgroup> scores: array<f32, 64>;   // by key
var<workgroup> weights: array<f32, 64>;

fn bounded(score: f32) -> f32 {
  if (p.softcap == 0) { return score; }
  let e = exp(-2 * abs(score) / p.softcap);  // WGSL's own tanh may be wrong by 1e-5
  return sign(score) * p.softcap * (1 - e) / (1 + e);
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let head = group.y;
  let query = ((group.z * p.T + group.x) * p.H + head) * p.D;
  let keys = group.z * p.S;                // row of the first key
  let key_head = head / (p.H / p.KV);
  let place = at[0] + group.x;
  var start = 0u;
  if (p.window > 0 && place + 1 > p.window) { start = place + 1 - p.window; }
  for (var c = thread; c < p.D; c += SIZE) { sums[c] = 0; }
  var highest = LOWEST;
  var total = 0.0;
  for (var base = start; base <= place; base += 64) {
    let count = min(64u, place + 1 - base);
    for (var i = thread; i < count; i += SIZE) {
      let key = base + i;
      let k_start = ((keys + key) * p.KV + key_head) * p.D;
      var product = 0.0;
      for (var c = 0u; c < p.D; c++) { product += q[query + c] * k[k_start + c]; }
      let is_seen = taken[keys + key] != 0 || key == place;
      scores[i] = select(LOWEST, bounded(product * p.scale) - slopes[head] * f32(place - key), is_seen);
    }
    workgroupBarrier();
    var top = highest;
    for (var i = 0u; i < count; i++) { top = max(top, scores[i]); }
    let shrink = exp(highest - top);
    highest = top;
    for (var i = thread; i < count; i += SIZE) { weights[i] = select(0.0, exp(scores[i] - top), scores[i] > LOWEST); }
    workgroupBarrier();
    total *= shrink;
    for (var i = 0u; i < count; i++) { total += weights[i]; }
    for (var c = thread; c < p.D; c += SIZE) {
      var column = sums[c] * shrink;
      for (var i = 0u; i < count; i++) { column += weights[i] * v[((keys + base + i) * p.KV + key_head) * p.D + c]; }
      sums[c] = column;
    }
  }
  for (var c = thread; c < p.D; c += SIZE) { o[query + c] = sums[c] / total; }
  if (thread == 0) { lse[query / p.D] = highest + log(total); }
}
