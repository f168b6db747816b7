// attention.wgsl for one query, that of the position at[0], with its settings and a D that is a multiple of 4: o = softmax(q k^T
// scale + bias) v, where q and o are (H, D), and k and v (positions, KV, D). by_place: ALiBi's slopes (H,).
//
// With ENTERS the kernel also does what enter_cache.wgsl does: q is qkv (H + 2 KV, D) as the token's projection gave it, with
// NORM the queries and keys are normalized, the first R numbers of their heads are rotated, by_place has the turns if R > 0,
// and the key and value are written to the row at[0] of the caches. No workgroup reads this row: each computes its own copy.
//
// A workgroup computes a head, and takes SIZE keys at a time. First each thread computes the score of a key. Then the threads
// are a table of keys and columns: each sums every LINES-th key's four columns of v.

override SIZE: u32 = 256;  // threads
override ENTERS: bool = false;
override NORM: bool = false;

struct Params { H: u32, KV: u32, D: u32, window: u32, scale: f32, softcap: f32, R: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> by_place: array<f32>;
@group(0) @binding(3) var<storage, read> q_weight: array<f32>;
@group(0) @binding(4) var<storage, read> k_weight: array<f32>;
@group(0) @binding(5) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> k: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> v: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read_write> o: array<vec4<f32>>;

const LOWEST = -1e30;
var<workgroup> query: array<vec4<f32>, 64>;
var<workgroup> own_key: array<vec4<f32>, 64>;
var<workgroup> weights: array<f32, SIZE>;
var<workgroup> parts: array<f32, SIZE>;
var<workgroup> columns: array<vec4<f32>, SIZE>;

fn bounded(score: f32) -> f32 {
  if (p.softcap == 0) { return score; }
  let e = exp(-2 * abs(score) / p.softcap);  // WGSL's own tanh may be wrong by 1e-5
  return sign(score) * p.softcap * (1 - e) / (1 + e);
}

// 1 / RMS of the head that starts at q[start].
fn inverse_rms(start: u32) -> f32 {
  var sum = 0.0;
  for (var c = 0u; c < p.D / 4; c++) { sum += dot(q[start + c], q[start + c]); }
  return inverseSqrt(sum / f32(p.D) + p.eps);
}

// Number c of the head that starts at q[start], a query or key, after its norm.
fn normed(start: u32, c: u32, is_query: bool, factor: f32) -> f32 {
  let x = q[start + c / 4][c % 4];
  if (!NORM) { return x; }
  if (is_query) { return x * factor * q_weight[c]; }
  return x * factor * k_weight[c];
}

// The same number, rotated.
fn turned(start: u32, c: u32, is_query: bool, factor: f32) -> f32 {
  let half = p.R / 2;
  if (c >= 2 * half) { return normed(start, c, is_query, factor); }
  let pair = c % half;
  let turn = 2 * (at[0] * half + pair);
  let a = normed(start, pair, is_query, factor);
  let b = normed(start, pair + half, is_query, factor);
  if (c < half) { return a * by_place[turn] - b * by_place[turn + 1]; }
  return a * by_place[turn + 1] + b * by_place[turn];
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let head = group.x;
  let key_head = head / (p.H / p.KV);
  let width = p.D / 4;                 // in vectors
  let lines = SIZE / width;            // keys whose columns are summed at a time
  let line = thread / width;
  let column = thread % width;
  let own_value = (p.H + p.KV + key_head) * width;
  var end = at[0] + 1;                 // of the keys in the cache that are read
  var start = 0u;
  if (p.window > 0 && end > p.window) { start = end - p.window; }
  var slope = 0.0;
  if (p.R == 0) { slope = by_place[head]; }
  if (ENTERS) {
    let enters = head % (p.H / p.KV) == 0;
    let row = (at[0] * p.KV + key_head) * width;
    for (var n = thread; n < 2 * width; n += SIZE) {
      let is_query = n < width;
      let begin = select(p.H + key_head, head, is_query) * width;
      var factor = 1.0;
      if (NORM) { factor = inverse_rms(begin); }
      let c = n % width;
      var four: vec4<f32>;
      for (var i = 0u; i < 4; i++) { four[i] = turned(begin, 4 * c + i, is_query, factor); }
      if (is_query) {
        query[c] = four;
      } else {
        own_key[c] = four;
        if (enters) {
          k[row + c] = four;
          v[row + c] = q[own_value + c];
        }
      }
    }
    end -= 1;
  } else {
    for (var c = thread; c < width; c += SIZE) { query[c] = q[head * width + c]; }
  }
  if (thread >= width && thread < 64) { query[thread] = vec4(0.0); }  // for loads behind its end
  workgroupBarrier();
  var highest = LOWEST;
  var sum = 0.0;                       // of the weights that this thread has computed
  var four = vec4(0.0);                // columns of the weighted sum of v
  if (ENTERS) {                        // the token's own key and value, at distance 0
    var product = vec4(0.0);
    for (var c = 0u; c < width; c++) { product += query[c] * own_key[c]; }
    highest = bounded(dot(product, vec4(1.0)) * p.scale);
    if (thread == 0) { sum = 1; }
    if (line == 0) { four = q[own_value + column]; }
  }
  for (var base = start; base < end; base += SIZE) {
    let count = min(SIZE, end - base);
    var score = LOWEST;
    if (thread < count) {
      let key = ((base + thread) * p.KV + key_head) * width;
      var product = vec4(0.0);
      for (var c = 0u; c < width; c += 4) {  // four loads at a time, here and below, hide their latency
        let k0 = k[key + c];
        let k1 = k[key + min(c + 1, width - 1)];
        let k2 = k[key + min(c + 2, width - 1)];
        let k3 = k[key + min(c + 3, width - 1)];
        product += query[c] * k0 + query[c + 1] * k1 + query[c + 2] * k2 + query[c + 3] * k3;
      }
      score = bounded(dot(product, vec4(1.0)) * p.scale) - slope * f32(at[0] - base - thread);
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
      let first = (base * p.KV + key_head) * width + column;
      let row = p.KV * width;
      for (var i = line; i < count; i += 4 * lines) {
        let keys = vec4(i) + lines * vec4(0u, 1, 2, 3);
        let inside = min(keys, vec4(count - 1));
        let v0 = v[first + inside.x * row];
        let v1 = v[first + inside.y * row];
        let v2 = v[first + inside.z * row];
        let v3 = v[first + inside.w * row];
        let w = select(vec4(0.0), vec4(weights[inside.x], weights[inside.y], weights[inside.z], weights[inside.w]), keys < vec4(count));
        four += w.x * v0 + w.y * v1 + w.z * v2 + w.w * v3;
      }
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
