// (+ tiles.wgsl)
// attention_backward_kv.wgsl, with its settings and arguments, for devices whose workgroups have fast shared memory; D must be a
// multiple of 4, and at most 128. 16 x 16 threads compute dk and dv of 64 keys of a head, and take 64 queries at a time: as
// in attention_backward_q_tiled.wgsl, with queries and keys exchanged.

override WIDTH: u32 = 128;  // at least D

struct Params { T: u32, H: u32, KV: u32, D: u32, window: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> slopes: array<f32>;
@group(0) @binding(2) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> d_o: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read> lse_delta: array<f32>;
@group(0) @binding(7) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read_write> dv: array<vec4<f32>>;

fn d_o4(row: u32, head: u32, column: u32, inside: bool) -> vec4<f32> {
  if (!inside || column >= p.D) { return vec4(0.0); }
  return d_o[((row * p.H + head) * p.D + column) / 4];
}

@compute @workgroup_size(16, 16)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let first = group.x * 64;                // of the keys
  let key_head = group.y;
  let start_row = group.z * p.T;           // of the sequence
  let mine = first + local.y * 4;          // the first of this thread's keys
  let block = thread % 64 / 4;
  let deep = thread % 4 * 4;
  var end = p.T;                           // of the queries that see these keys
  if (p.window > 0) { end = min(p.T, first + 63 + p.window); }
  let share = p.H / p.KV;
  var values = mat4x4<f32>();              // of four columns of dv, for each key; and those from 64 on
  var more_values = mat4x4<f32>();
  var keys = mat4x4<f32>();                // of dk
  var more_keys = mat4x4<f32>();
  for (var head = key_head * share; head < (key_head + 1) * share; head++) {
    for (var base = first; base < end; base += 64) {
      var scores = mat4x4<f32>();          // a vector is that of a key
      var d_weights = mat4x4<f32>();
      for (var column = 0u; column < p.D; column += DEEP) {
        var four = mat4x4<f32>();
        for (var r = 0u; r < 4; r++) {
          let query = base + block * 4 + r;
          let key = first + block * 4 + r;
          switch (thread / 64) {
            case 0: { four[r] = k4(start_row + key, key_head, column + deep, key < p.T); }
            case 1: { four[r] = q4(start_row + query, head, column + deep, query < p.T); }
            case 2: { four[r] = v4(start_row + key, key_head, column + deep, key < p.T); }
            default: { four[r] = d_o4(start_row + query, head, column + deep, query < p.T); }
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
      let ids = vec4(base + local.x * 4) + vec4(0u, 1, 2, 3);  // of this thread's queries
      var lse = vec4(0.0);
      var delta = vec4(0.0);
      for (var c = 0u; c < 4; c++) {
        let row = (start_row + min(ids[c], p.T - 1)) * p.H + head;
        lse[c] = lse_delta[row];
        delta[c] = lse_delta[groups.z * p.T * p.H + row];
      }
      for (var r = 0u; r < 4; r++) {
        let distance = vec4<i32>(ids) - vec4<i32>(vec4(mine + r));
        var seen = (distance >= vec4(0)) & (ids < vec4(p.T));
        if (p.window > 0) { seen = seen & (distance < vec4(i32(p.window))); }
        let weight = select(vec4(0.0), exp(scores[r] * p.scale - slopes[head] * vec4<f32>(distance) - lse), seen);
        scores[r] = weight;
        d_weights[r] = weight * (d_weights[r] - delta) * p.scale;
      }
      let weights = transpose(scores);     // a vector is that of a query
      let d_scores = transpose(d_weights);
      for (var part = 0u; part < 4; part++) {
        for (var half = 0u; half < (WIDTH + 63) / 64; half++) {
          workgroupBarrier();
          if (local.x / 4 == part) {
            for (var c = 0u; c < 4; c++) {
              left[place(local.x % 4 * 4 + c, local.y)] = weights[c];
              left2[place(local.x % 4 * 4 + c, local.y)] = d_scores[c];
            }
          }
          let query = base + part * DEEP + local.y;
          right[place(local.y, local.x)] = d_o4(start_row + query, head, local.x * 4 + half * 64, query < p.T);
          right2[place(local.y, local.x)] = q4(start_row + query, head, local.x * 4 + half * 64, query < p.T);
          workgroupBarrier();
          for (var c = 0u; c < DEEP; c++) {
            let of_value = outer(left[place(c, local.y)], right[place(c, local.x)]);
            let of_key = outer(left2[place(c, local.y)], right2[place(c, local.x)]);
            if (half == 0) {
              values += of_value;
              keys += of_key;
            } else {
              more_values += of_value;
              more_keys += of_key;
            }
          }
        }
      }
    }
  }
  for (var r = 0u; r < 4; r++) {
    let to = (((start_row + mine + r) * p.KV + key_head) * p.D + local.x * 4) / 4;
    if (mine + r < p.T && local.x * 4 < p.D) {
      dk[to] = keys[r];
      dv[to] = values[r];
    }
    if (WIDTH > 64 && mine + r < p.T && local.x * 4 + 64 < p.D) {
      dk[to + 16] = more_keys[r];
      dv[to + 16] = more_values[r];
    }
  }
}
