// The gradient of attention.wgsl's q from d_o, that of its o. All else is as in attention.wgsl, with S = T and at[0] = 0:
//
//   w = exp(score - lse),  delta = sum(d_o o),  d_score = w (d_o v - delta),  dq = scale sum over keys of d_score k
//
// and delta (B T, H), for attention_backward_kv.wgsl. A workgroup computes four queries of a head, as in attention.wgsl.

override SIZE: u32 = 64;    // threads
override WIDTH: u32 = 256;  // at least D, but not more than needed: shared memory is zeroed at the start

struct Params { T: u32, H: u32, KV: u32, D: u32, window: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> slopes: array<f32>;
@group(0) @binding(2) var<storage, read> q: array<f32>;
@group(0) @binding(3) var<storage, read> k: array<f32>;
@group(0) @binding(4) var<storage, read> v: array<f32>;
@group(0) @binding(5) var<storage, read> o: array<f32>;
@group(0) @binding(6) var<storage, read> d_o: array<f32>;
@group(0) @binding(7) var<storage, read_write> lse_delta: array<f32>;  // lse (B T, H), then delta (B T, H)
@group(0) @binding(8) var<storage, read_write> dq: array<f32>;

var<workgroup> queries: array<vec4<f32>, WIDTH>;  // by column
var<workgroup> outs: array<vec4<f32>, WIDTH>;     // d_o, by column
var<workgroup> sums: array<vec4<f32>, WIDTH>;     // of d_score k, by column
var<workgroup> parts: array<vec4<f32>, 64>;       // by key

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let first = group.x * 4;
  let head = group.y;
  let row = group.z * p.T + first;
  let key_head = head / (p.H / p.KV);
  let n = min(4u, p.T - first);
  let rows = groups.z * p.T;
  var delta = vec4(0.0);
  var lse = vec4(0.0);
  for (var c = thread; c < p.D; c += SIZE) {
    var four = vec4(0.0);
    var out = vec4(0.0);
    for (var r = 0u; r < n; r++) {
      let at = ((row + r) * p.H + head) * p.D + c;
      four[r] = q[at];
      out[r] = d_o[at];
      delta[r] += d_o[at] * o[at];
    }
    queries[c] = four;
    outs[c] = out;
    sums[c] = vec4(0.0);
  }
  for (var r = 0u; r < n; r++) { lse[r] = lse_delta[(row + r) * p.H + head]; }
  parts[thread] = delta;
  workgroupBarrier();
  delta = vec4(0.0);
  for (var i = 0u; i < SIZE; i++) { delta += parts[i]; }
  if (thread < n) { lse_delta[(rows + row + thread) * p.H + head] = delta[thread]; }
  workgroupBarrier();
  let places = vec4(first) + vec4(0u, 1, 2, 3);
  let end = first + n;
  var start = 0u;
  if (p.window > 0 && first + 1 > p.window) { start = first + 1 - p.window; }
  for (var base = start; base < end; base += 64) {
    let count = min(64u, end - base);
    for (var i = thread; i < count; i += SIZE) {
      let key = ((group.z * p.T + base + i) * p.KV + key_head) * p.D;
      var product = vec4(0.0);
      var d_weight = vec4(0.0);
      for (var c = 0u; c < p.D; c++) {
        product += queries[c] * k[key + c];
        d_weight += outs[c] * v[key + c];
      }
      let distance = vec4<i32>(places) - i32(base + i);
      var seen = distance >= vec4(0);
      if (p.window > 0) { seen = seen & (distance < vec4(i32(p.window))); }
      let weight = exp(product * p.scale - slopes[head] * vec4<f32>(distance) - lse);
      parts[i] = select(vec4(0.0), weight * (d_weight - delta) * p.scale, seen);
    }
    workgroupBarrier();
    for (var c = thread; c < p.D; c += SIZE) {
      var column = sums[c];
      var at = ((group.z * p.T + base) * p.KV + key_head) * p.D + c;
      for (var i = 0u; i < count; i++) {
        column += parts[i] * k[at];
        at += p.KV * p.D;
      }
      sums[c] = column;
    }
    workgroupBarrier();
  }
  for (var r = 0u; r < n; r++) {
    for (var c = thread; c < p.D; c += SIZE) { dq[((row + r) * p.H + head) * p.D + c] = sums[c][r]; }
  }
}
