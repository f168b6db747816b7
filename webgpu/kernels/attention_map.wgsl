// The attention weights of one sequence, map (H, T, T) with queries in rows and keys in columns, from its q, k and lse (see
// attention.wgsl, with S = T). A thread computes a weight.

struct Params { T: u32, H: u32, KV: u32, D: u32, window: u32, scale: f32, softcap: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> slopes: array<f32>;
@group(0) @binding(2) var<storage, read> q: array<f32>;
@group(0) @binding(3) var<storage, read> k: array<f32>;
@group(0) @binding(4) var<storage, read> lse: array<f32>;
@group(0) @binding(5) var<storage, read_write> map: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  let j = n % p.T;
  let i = n / p.T % p.T;
  let head = n / p.T / p.T;
  if (head >= p.H) { return; }
  var weight = 0.0;
  if (j <= i && (p.window == 0 || i - j < p.window)) {
    let query = (i * p.H + head) * p.D;
    let key = (j * p.KV + head / (p.H / p.KV)) * p.D;
    var product = 0.0;
    for (var c = 0u; c < p.D; c++) { product += q[query + c] * k[key + c]; }
    var score = product * p.scale;
    if (p.softcap > 0) {
      let e = exp(-2 * abs(score) / p.softcap);
      score = sign(score) * p.softcap * (1 - e) / (1 + e);
    }
    weight = exp(score - slopes[head] * f32(i - j) - lse[i * p.H + head]);
  }
  map[n] = weight;
}
