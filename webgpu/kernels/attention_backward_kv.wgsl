// The gradients of attention.wgsl's k and v, from what attention_backward_q.wgsl has, and its delta:
//
//   dv = sum over queries of w d_o,   dk = scale sum over queries of d_score q,   of all heads that share a key's
//
// A workgroup of 64 threads has four keys of a head, which are the components of its vectors. It goes over the queries 64
// at a time: first a thread has a query, for w and d_score, then a column of dk and dv.

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

var<workgroup> keys: array<vec4<f32>, 256>;     // by column
var<workgroup> values: array<vec4<f32>, 256>;
var<workgroup> weights: array<vec4<f32>, 64>;   // by query
var<workgroup> d_scores: array<vec4<f32>, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let first = group.x * 4;
  let key_head = group.y;
  let row = group.z * p.T + first;
  let n = min(4u, p.T - first);
  let rows = groups.z * p.T;
  for (var c = thread; c < p.D; c += 64) {
    var key = vec4(0.0);
    var value = vec4(0.0);
    for (var r = 0u; r < n; r++) {
      let at = ((row + r) * p.KV + key_head) * p.D + c;
      key[r] = k[at];
      value[r] = v[at];
    }
    keys[c] = key;
    values[c] = value;
  }
  workgroupBarrier();
  let places = vec4(first) + vec4(0u, 1, 2, 3);
  var end = p.T;
  if (p.window > 0) { end = min(p.T, first + n - 1 + p.window); }
  var d_key = array<vec4<f32>, 4>();
  var d_value = array<vec4<f32>, 4>();
  let share = p.H / p.KV;
  for (var head = key_head * share; head < (key_head + 1) * share; head++) {
    for (var base = first; base < end; base += 64) {
      let i = base + thread;
      var weight = vec4(0.0);
      var d_score = vec4(0.0);
      if (i < end) {
        let query = ((group.z * p.T + i) * p.H + head) * p.D;
        var product = vec4(0.0);
        var d_weight = vec4(0.0);
        for (var c = 0u; c < p.D; c++) {
          product += keys[c] * q[query + c];
          d_weight += values[c] * d_o[query + c];
        }
        let distance = i32(i) - vec4<i32>(places);
        var seen = distance >= vec4(0);
        if (p.window > 0) { seen = seen & (distance < vec4(i32(p.window))); }
        let of_query = (group.z * p.T + i) * p.H + head;
        let score = product * p.scale - slopes[head] * vec4<f32>(distance);
        weight = select(vec4(0.0), exp(score - lse_delta[of_query]), seen);
        d_score = weight * (d_weight - lse_delta[rows * p.H + of_query]) * p.scale;
      }
      weights[thread] = weight;
      d_scores[thread] = d_score;
      workgroupBarrier();
      let count = min(64u, end - base);
      for (var c = 0u; thread + 64 * c < p.D; c++) {
        var key = d_key[c];
        var value = d_value[c];
        var at = ((group.z * p.T + base) * p.H + head) * p.D + thread + 64 * c;
        for (var m = 0u; m < count; m++) {
          key += d_scores[m] * q[at];
          value += weights[m] * d_o[at];
          at += p.H * p.D;
        }
        d_key[c] = key;
        d_value[c] = value;
      }
      workgroupBarrier();
    }
  }
  for (var r = 0u; r < n; r++) {
    for (var c = 0u; thread + 64 * c < p.D; c++) {
      let at = ((row + r) * p.KV + key_head) * p.D + thread + 64 * c;
      dk[at] = d_key[c][r];
      dv[at] = d_value[c][r];
    }
  }
}
