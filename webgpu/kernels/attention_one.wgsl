// attention.wgsl for one query, that of the position at[0], with its settings and a D that is a multiple of 4: o = softmax(q k^T
// scale + bias) v, where q and o are (H, D), and k and v (positions, KV, D).
//
// A workgroup computes a head, and takes SIZE keys at a time. First each thread computes the score of a key. Then the threads
// are a table of keys and columns: each sums every LINES-th key's four columns of v.

override SIZE: u32 = 256;  // threads

struct Params { H: u32, KV: u32, D: u32, window: u32, scale: f32, softcap: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> slopes: array<f32>;
@group(0) @binding(3) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> o: array<vec4<f32>>;

const LOWEST = -1e30;
var<workgroup> query: array<vec4<f32>, 64>;
var<workgroup> weights: array<f32, SIZE>;
var<workgroup> parts: array<f32, SIZE>;
var<workgroup> columns: array<vec4<f32>, SIZE>;

fn bounded(score: f32) -> f32 {
  if (p.softcap == 0) { return score; }
  let e = exp(-2 * abs(score) / p.softcap);  // WGSL's own tanh may be wrong by 1e-5
  return sign(score) * p.softcap * (1 - e) / (1 + e);
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let head = group.x;
  let key_head = head / (p.H / p.KV);
  let width = p.D / 4;                 // in vectors
  let lines = SIZE / width;            // keys whose columns are summed at a time
  let line = thread / width;
  let column = thread % width;
  for (var c = thread; c < width; c += SIZE) { query[c] = q[head * width + c]; }
  workgroupBarrier();
  let end = at[0] + 1;
  var start = 0u;
  if (p.window > 0 && end > p.window) { start = end - p.window; }
  var highest = LOWEST;
  var sum = 0.0;                       // of the weights that this thread has computed
  var four = vec4(0.0);                // columns of the weighted sum of v
  for (var base = start; base < end; base += SIZE) {
    let count = min(SIZE, end - base);
    var score = LOWEST;
    if (thread < count) {
      let key = ((base + thread) * p.KV + key_head) * width;
      var product = vec4(0.0);
      for (var c = 0u; c < width; c++) { product += query[c] * k[key + c]; }
      score = bounded(dot(product, vec4(1.0)) * p.scale) - slopes[head] * f32(end - 1 - base - thread);
    }
    parts[thread] = score;
    for (var half = SIZE / 2; half > 0; half /= 2) {
      workgroupBarrier();
      if (thread < half) { parts[thread] = max(parts[thread], parts[thread + half]); }
    }
    workgroupBarrier();
    let top = max(highest, parts[0]);
    let shrink = exp(highest - top);
    highest = top;
    let weight = select(0.0, exp(score - top), thread < count);
    sum = sum * shrink + weight;
    weights[thread] = weight;
    workgroupBarrier();
    four *= shrink;
    if (line < lines) {
      for (var i = line; i < count; i += lines) { four += weights[i] * v[((base + i) * p.KV + key_head) * width + column]; }
    }
    workgroupBarrier();
  }
  parts[thread] = sum;
  columns[thread] = four;
  for (var half = SIZE / 2; half > 0; half /= 2) {
    workgroupBarrier();
    if (thread < half) { parts[thread] += parts[thread + half]; }
  }
  workgroupBarrier();
  if (thread < width) {
    var whole = vec4(0.0);
    for (var i = 0u; i < lines; i++) { whole += columns[i * width + thread]; }
    o[head * width + thread] = whole / parts[0];
  }
}
