// (+ sinks_score.wgsl)
// Queries that have a window attend to the first keys too, the sinks, where their window does not hold them. Each sink is added
// to the results of attention.wgsl, o (R, H, D) and lse (R, H), whose shapes, arguments and S, the rows of k for each sequence,
// are as there:
//
//   new lse = log(exp(lse) + exp(score)),   new o = exp(lse - new lse) o + exp(score - new lse) v
//
// rotary: the numbers of a head that turns (positions, rotary / 2) turn, see rope.wgsl. A thread takes a query of a head.

struct Params {
  R: u32, T: u32, S: u32, H: u32, KV: u32, D: u32, rotary: u32, sinks: u32, window: u32, scale: f32, softcap: f32
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> slopes: array<f32>;
@group(0) @binding(3) var<storage, read> turns: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read> q: array<f32>;
@group(0) @binding(5) var<storage, read> k: array<f32>;
@group(0) @binding(6) var<storage, read> v: array<f32>;
@group(0) @binding(7) var<storage, read_write> o: array<f32>;
@group(0) @binding(8) var<storage, read_write> lse: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n >= p.R * p.H) { return; }
  let head = n % p.H;
  let row = n / p.H;
  let position = at[0] + row % p.T;
  for (var j = 0u; j < p.sinks && j + p.window <= position; j++) {
    let key = (row / p.T * p.S + j) * p.KV + head / (p.H / p.KV);
    let score = score_of(n, head, position, key, j);
    let old = lse[n];
    let top = max(old, score);
    let new_lse = top + log(exp(old - top) + exp(score - top));
    for (var c = 0u; c < p.D; c++) {
      o[n * p.D + c] = exp(old - new_lse) * o[n * p.D + c] + exp(score - new_lse) * v[key * p.D + c];
    }
    lse[n] = new_lse;
  }
}
