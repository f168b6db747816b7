// For one token, all that lies between its projection and attention. qkv: the queries (H, D), keys (KV, D) and values (KV, D)
// of the token. With NORM, queries and keys become RMSNorm(x) weight, head by head, as in norm.wgsl; then the first R numbers
// of their heads are rotated, as in rope.wgsl. Queries go to q, keys and values to the row at[0] of their caches.
//
// A workgroup takes a head of queries, of keys or of values.

override SIZE: u32 = 64;  // threads
override NORM: bool = false;

struct Params { H: u32, KV: u32, D: u32, R: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> turns: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> q_weight: array<f32>;
@group(0) @binding(4) var<storage, read> k_weight: array<f32>;
@group(0) @binding(5) var<storage, read> qkv: array<f32>;
@group(0) @binding(6) var<storage, read_write> q: array<f32>;
@group(0) @binding(7) var<storage, read_write> k: array<f32>;
@group(0) @binding(8) var<storage, read_write> v: array<f32>;

var<workgroup> head: array<f32, 256>;
var<workgroup> squares: array<f32, SIZE>;

fn write(place: u32, c: u32, value: f32) {
  if (place < p.H) {
    q[place * p.D + c] = value;
  } else if (place < p.H + p.KV) {
    k[(at[0] * p.KV + place - p.H) * p.D + c] = value;
  } else {
    v[(at[0] * p.KV + place - p.H - p.KV) * p.D + c] = value;
  }
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let place = group.x;                      // of the head, among all of qkv
  let is_value = place >= p.H + p.KV;
  var sum = 0.0;
  for (var c = thread; c < p.D; c += SIZE) {
    let value = qkv[place * p.D + c];
    head[c] = value;
    sum += value * value;
  }
  squares[thread] = sum;
  workgroupBarrier();
  if (NORM && !is_value) {
    sum = 0.0;
    for (var i = 0u; i < SIZE; i++) { sum += squares[i]; }
    let scale = inverseSqrt(sum / f32(p.D) + p.eps);
    for (var c = thread; c < p.D; c += SIZE) {
      var weight = k_weight[c];
      if (place < p.H) { weight = q_weight[c]; }
      head[c] *= scale * weight;
    }
  }
  workgroupBarrier();
  let half = select(p.R / 2, 0, is_value);
  for (var c = thread; c < p.D; c += SIZE) {
    if (c < half) {
      let turn = turns[at[0] * half + c];
      write(place, c, head[c] * turn.x - head[c + half] * turn.y);
      write(place, c + half, head[c] * turn.y + head[c + half] * turn.x);
    } else if (c >= 2 * half) {
      write(place, c, head[c]);
    }
  }
}
