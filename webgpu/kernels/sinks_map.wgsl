// (+ sinks_score.wgsl)
// The weights of the sinks, see sinks.wgsl, in the maps (H, T, T) of attention_map.wgsl, where the window does not hold them.
// lse (T, H): with the sinks. A thread computes a weight.

struct Params {
  R: u32, T: u32, S: u32, H: u32, KV: u32, D: u32, rotary: u32, sinks: u32, window: u32, scale: f32, softcap: f32
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> slopes: array<f32>;
@group(0) @binding(3) var<storage, read> turns: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read> q: array<f32>;
@group(0) @binding(5) var<storage, read> k: array<f32>;
@group(0) @binding(6) var<storage, read> lse: array<f32>;
@group(0) @binding(7) var<storage, read_write> map: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  let j = n % p.sinks;
  let i = n / p.sinks % p.T;
  let head = n / p.sinks / p.T;
  if (head >= p.H || j + p.window > at[0] + i) { return; }
  let score = score_of(i * p.H + head, head, at[0] + i, j * p.KV + head / (p.H / p.KV), j);
  map[(head * p.T + i) * p.T + j] = exp(score - lse[i * p.H + head]);
}
