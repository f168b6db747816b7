// The gradients of attention.wgsl's k and v, from the arguments of attention_backward_q.wgsl and its result delta:
//
//   dv = sum over queries of w d_o,   dk = scale sum over queries of d_score q,   over all query heads of a key head
//
// A workgroup computes four keys of a head, which are the components of its vectors. It takes 64 queries at a time: first
// each thread computes w and d_score of a query, then a column of dk and dv.

override SIZE: u32 = 64;    // threads
override WIDTH: u32 = 256;  // at least D, but not more than needed: shared memory is zeroed at the start

struct Params { T: u32, H: u32, KV: u32, D: u32, window: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> slopes: array<f32>;
@group(0) @binding(2) var<storage, read> q: array<f32>;
@group(0) @binding(3) var<storage, read> k: array<f32>;
@group(0) @binding(4) var<storage, read> v: array<f32>;
@group(0) @binding(5) var<storage, read> d_o: array<f32>;
@group(0) @binding(6) var<storage, read> lse_delta: array<f32>;
@group(0) @binding(7) var<storage, read_write> dk: array<f32>;
@group(0) @binding(8) var<storage, read_write> dv: array<f32>;

var<workgroup> keys: array<vec4<f32>, WIDTH>;    // by column
var<workgroup> values: array<vec4<f32>, WIDTH>;
var<workgroup> weights: array<vec4<f32>, 64>;    // by query
var<workgroup> d_scores: array<vec4<f32>, 64>;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let first = group.x * 4;
  let key_head = group.y;
  let row = group.z * p.T + first;
  let n = min(4u, p.T - first);
  let rows = groups.z * p.T;
  for (var c = thread; c < p.D; c += SIZE) {
    var key = vec4(0.0);
    var value = vec4(0.0);
    for (var r = 0u; r < n; r++) {
      let at = ((row + r) * p.KV + key_head) * p.D + c;
      key[r] = k[at];
      value[r] = v[at];
      dk[at] = 0;
      dv[at] = 0;
    }
    keys[c] = key;
    values[c] = value;
  }
  workgroupBarrier();
  let places = vec4(first) + vec4(0u, 1, 2, 3);
  var end = p.T;
  if (p.window > 0) { end = min(p.T, first + n - 1 + p.window); }
  let share = p.H / p.KV;
  for (var head = key_head * share; head < (key_head + 1) * share; head++) {
    for (var base = first; base < end; base += 64) {
      let count = min(64u, end - base);
      for (var i = thread; i < count; i += SIZE) {
        let of_query = (group.z * p.T + base + i) * p.H + head;
        let query = of_query * p.D;
        var product = vec4(0.0);
        var d_weight = vec4(0.0);
        for (var c = 0u; c < p.D; c++) {
          product += keys[c] * q[query + c];
          d_weight += values[c] * d_o[query + c];
        }
        let distance = i32(base + i) - vec4<i32>(places);
        var seen = distance >= vec4(0);
        if (p.window > 0) { seen = seen & (distance < vec4(i32(p.window))); }
        let score = product * p.scale - slopes[head] * vec4<f32>(distance);
        let weight = select(vec4(0.0), exp(score - lse_delta[of_query]), seen);
        weights[i] = weight;
        d_scores[i] = weight * (d_weight - lse_delta[rows * p.H + of_query]) * p.scale;
      }
      workgroupBarrier();
      for (var c = thread; c < p.D; c += SIZE) {
        var key = vec4(0.0);
        var value = vec4(0.0);
        var at = ((group.z * p.T + base) * p.H + head) * p.D + c;
        for (var i = 0u; i < count; i++) {
          key += d_scores[i] * q[at];
          value += weights[i] * d_o[at];
          at += p.H * p.D;
        }
        for (var r = 0u; r < n; r++) {
          let to = ((row + r) * p.KV + key_head) * p.D + c;
          dk[to] += key[r];
          dv[to] += value[r];
        }
      }
      workgroupBarrier();
    }
  }
}
