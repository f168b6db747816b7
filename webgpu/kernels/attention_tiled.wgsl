// (+ tiles.wgsl)
// attention.wgsl, with its settings and arguments, for many queries on devices whose workgroups have fast shared memory; D
// must be a multiple of 4, and at most 128.
//
// 16 x 16 threads compute 64 queries of a head, and take 64 keys at a time (Dao et al. 2022). As in matmul_tiled.wgsl, a thread
// computes 4 x 4 scores from tiles of 16 columns of q and k, and the same 4 queries' sums of 4 columns of v, or 8 if D is
// over 64, from tiles of 16 keys. What belongs to a query is spread over 16 threads, which add it up through left2.

override WIDTH: u32 = 128;  // at least D

struct Params { T: u32, S: u32, H: u32, KV: u32, D: u32, window: u32, scale: f32, softcap: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> slopes: array<f32>;
@group(0) @binding(3) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> o: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> lse: array<f32>;

const LOWEST = -1e30;

fn bounded(score: vec4<f32>) -> vec4<f32> {
  if (p.softcap == 0) { return score; }
  let e = exp(-2 * abs(score) / p.softcap);  // WGSL's own tanh may be wrong by 1e-5
  return sign(score) * p.softcap * (1 - e) / (1 + e);
}

@compute @workgroup_size(16, 16)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let first = group.x * 64;                // of the queries
  let head = group.y;
  let key_head = head / (p.H / p.KV);
  let rows = group.z * p.T;                // of the sequence's first query
  let keys = group.z * p.S;                // and of its first key
  let mine = first + local.y * 4;          // the first of this thread's queries
  let end = at[0] + min(first + 64, p.T);
  var start = 0u;
  if (p.window > 0 && at[0] + first + 1 > p.window) { start = at[0] + first + 1 - p.window; }
  let block = thread % 64 / 4;
  let deep = thread % 4 * 4;
  var highest = vec4(LOWEST);
  var sum = vec4(0.0);                     // of the weights that this thread has computed
  var sums = mat4x4<f32>();                // of four columns of v, for each query
  var more = mat4x4<f32>();                // of the columns from 64 on
  for (var base = start; base < end; base += 64) {
    var scores = mat4x4<f32>();            // a vector is that of a query
    for (var column = 0u; column < p.D; column += DEEP) {
      var four = mat4x4<f32>();
      for (var r = 0u; r < 4; r++) {
        let query = first + block * 4 + r;
        let key = base + block * 4 + r;
        if (thread < 64) {
          four[r] = q4(rows + query, head, column + deep, query < p.T);
        } else if (thread < 128) {
          four[r] = k4(keys + key, key_head, column + deep, key < end);
        }
      }
      workgroupBarrier();
      if (thread < 128) { fill(thread, four); }
      workgroupBarrier();
      for (var c = 0u; c < DEEP; c++) { scores += outer(left[place(c, local.y)], right[place(c, local.x)]); }
    }
    let ids = vec4(base + local.x * 4) + vec4(0u, 1, 2, 3);  // of this thread's keys
    var top = vec4(LOWEST);
    for (var r = 0u; r < 4; r++) {
      let distance = vec4<i32>(vec4(at[0] + mine + r)) - vec4<i32>(ids);
      var seen = distance >= vec4(0);
      if (p.window > 0) { seen = seen & (distance < vec4(i32(p.window))); }
      let row = select(vec4(LOWEST), bounded(scores[r] * p.scale) - slopes[head] * vec4<f32>(distance), seen);
      scores[r] = row;
      top[r] = max(max(row.x, row.y), max(row.z, row.w));
    }
    left2[local.y * 16 + local.x] = top;
    workgroupBarrier();
    for (var i = 0u; i < 16; i++) { top = max(top, left2[local.y * 16 + i]); }
    top = max(top, highest);
    let shrink = exp(highest - top);
    highest = top;
    for (var r = 0u; r < 4; r++) {
      scores[r] = select(vec4(0.0), exp(scores[r] - top[r]), scores[r] > vec4(LOWEST));
      sum[r] = sum[r] * shrink[r] + dot(scores[r], vec4(1.0));
      sums[r] *= shrink[r];
      more[r] *= shrink[r];
    }
    let weights = transpose(scores);       // a vector is that of a key
    for (var part = 0u; part < 4; part++) {
      workgroupBarrier();
      if (local.x / 4 == part) {
        for (var c = 0u; c < 4; c++) { left[place(local.x % 4 * 4 + c, local.y)] = weights[c]; }
      }
      let id = base + part * DEEP + local.y;
      right[place(local.y, local.x)] = v4(keys + id, key_head, local.x * 4, id < end);
      if (WIDTH > 64) { right2[place(local.y, local.x)] = v4(keys + id, key_head, local.x * 4 + 64, id < end); }
      workgroupBarrier();
      for (var c = 0u; c < DEEP; c++) {
        let weight = left[place(c, local.y)];
        sums += outer(weight, right[place(c, local.x)]);
        if (WIDTH > 64) { more += outer(weight, right2[place(c, local.x)]); }
      }
    }
  }
  workgroupBarrier();
  left2[local.y * 16 + local.x] = sum;
  workgroupBarrier();
  var total = vec4(0.0);
  for (var i = 0u; i < 16; i++) { total += left2[local.y * 16 + i]; }
  for (var r = 0u; r < 4; r++) {
    let row = (rows + mine + r) * p.H + head;
    if (mine + r < p.T) {
      if (local.x * 4 < p.D) { o[(row * p.D + local.x * 4) / 4] = sums[r] / total[r]; }
      if (WIDTH > 64 && local.x * 4 + 64 < p.D) { o[(row * p.D + local.x * 4 + 64) / 4] = more[r] / total[r]; }
      if (local.x == 0) { lse[row] = highest[r] + log(total[r]); }
    }
  }
}
