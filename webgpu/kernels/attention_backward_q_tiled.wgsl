// (+ tiles.wgsl)
// attention_backward_q.wgsl, with its settings and arguments, for devices whose workgroups have fast shared memory; D must be a
// multiple of 4, and at most 128. 16 x 16 threads compute dq of 64 queries of a head, and take 64 keys at a time, as in
// attention_tiled.wgsl.

override WIDTH: u32 = 128;  // at least D

struct Params { T: u32, H: u32, KV: u32, D: u32, window: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> slopes: array<f32>;
@group(0) @binding(2) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> o: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read> d_o: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> lse_delta: array<f32>;  // lse (B T, H), then delta (B T, H)
@group(0) @binding(8) var<storage, read_write> dq: array<vec4<f32>>;

fn d_o4(row: u32, head: u32, column: u32, inside: bool) -> vec4<f32> {
  if (!inside || column >= p.D) { return vec4(0.0); }
  return d_o[((row * p.H + head) * p.D + column) / 4];
}

@compute @workgroup_size(16, 16)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let first = group.x * 64;                // of the queries
  let head = group.y;
  let key_head = head / (p.H / p.KV);
  let start_row = group.z * p.T;           // of the sequence
  let mine = first + local.y * 4;          // the first of this thread's queries
  let block = thread % 64 / 4;
  let deep = thread % 4 * 4;
  var delta = vec4(0.0);
  var lse = vec4(0.0);
  for (var r = 0u; r < 4; r++) {
    let row = start_row + min(mine + r, p.T - 1);
    lse[r] = lse_delta[row * p.H + head];
    for (var c = local.x * 4; c < p.D; c += 64) {
      let at = ((row * p.H + head) * p.D + c) / 4;
      delta[r] += dot(d_o[at], o[at]);
    }
  }
  left[thread] = delta;
  workgroupBarrier();
  delta = vec4(0.0);
  for (var i = 0u; i < 16; i++) { delta += left[local.y * 16 + i]; }
  for (var r = 0u; r < 4; r++) {
    if (local.x == 0 && mine + r < p.T) { lse_delta[(groups.z * p.T + start_row + mine + r) * p.H + head] = delta[r]; }
  }
  let end = min(first + 64, p.T);
  var start = 0u;
  if (p.window > 0 && first + 1 > p.window) { start = first + 1 - p.window; }
  var sums = mat4x4<f32>();                // of four columns of d_score k, for each query
  var more = mat4x4<f32>();                // of the columns from 64 on
  for (var base = start; base < end; base += 64) {
    var scores = mat4x4<f32>();            // a vector is that of a query
    var d_weights = mat4x4<f32>();
    for (var column = 0u; column < p.D; column += DEEP) {
      var four = mat4x4<f32>();
      for (var r = 0u; r < 4; r++) {
        let query = first + block * 4 + r;
        let key = base + block * 4 + r;
        switch (thread / 64) {
          case 0: { four[r] = q4(start_row + query, head, column + deep, query < p.T); }
          case 1: { four[r] = k4(start_row + key, key_head, column + deep, key < end); }
          case 2: { four[r] = d_o4(start_row + query, head, column + deep, query < p.T); }
          default: { four[r] = v4(start_row + key, key_head, column + deep, key < end); }
        }
      }
      workgroupBarrier();
      fill(thread, four);
      workgroupBarrier();
      for (var c = 0u; c < DEEP; c++) {
        scores += outer(left[place(c, local.y)], right[place(c, local.x)]);
        d_weights += outer(left2[place(c, local.y)], right2[place(c, local.x)]);
      }
    }
    let ids = vec4(base + local.x * 4) + vec4(0u, 1, 2, 3);  // of this thread's keys
    for (var r = 0u; r < 4; r++) {
      let distance = vec4<i32>(vec4(mine + r)) - vec4<i32>(ids);
      var seen = distance >= vec4(0);
      if (p.window > 0) { seen = seen & (distance < vec4(i32(p.window))); }
      let weight = exp(scores[r] * p.scale - slopes[head] * vec4<f32>(distance) - lse[r]);
      scores[r] = select(vec4(0.0), weight * (d_weights[r] - delta[r]) * p.scale, seen);
    }
    let d_scores = transpose(scores);      // a vector is that of a key
    for (var part = 0u; part < 4; part++) {
      workgroupBarrier();
      if (local.x / 4 == part) {
        for (var c = 0u; c < 4; c++) { left[place(local.x % 4 * 4 + c, local.y)] = d_scores[c]; }
      }
      let key = base + part * DEEP + local.y;
      right[place(local.y, local.x)] = k4(start_row + key, key_head, local.x * 4, key < end);
      if (WIDTH > 64) { right2[place(local.y, local.x)] = k4(start_row + key, key_head, local.x * 4 + 64, key < end); }
      workgroupBarrier();
      for (var c = 0u; c < DEEP; c++) {
        let d_score = left[place(c, local.y)];
        sums += outer(d_score, right[place(c, local.x)]);
        if (WIDTH > 64) { more += outer(d_score, right2[place(c, local.x)]); }
      }
    }
  }
  for (var r = 0u; r < 4; r++) {
    let to = (((start_row + mine + r) * p.H + head) * p.D + local.x * 4) / 4;
    if (mine + r < p.T && local.x * 4 < p.D) { dq[to] = sums[r]; }
    if (WIDTH > 64 && mine + r < p.T && local.x * 4 + 64 < p.D) { dq[to + 16] = more[r]; }
  }
}
