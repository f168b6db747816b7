// The attention maps of pairs of heads: y (P, T, T) = A1 - lambda A2, where A1 and A2 are the neighbours in maps (2 P, T, T). lambda
// (1,); TOKENS: the sigmoid of one for each query and pair (T, P). A thread computes a weight.

override TOKENS: bool = false;

struct Params { P: u32, T: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> lambda: array<f32>;
@group(0) @binding(2) var<storage, read> maps: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  let size = p.T * p.T;
  if (n >= p.P * size) { return; }
  var share = lambda[0];
  if (TOKENS) { share = 1 / (1 + exp(-lambda[n / p.T % p.T * p.P + n / size])); }
  let at = n / size * 2 * size + n % size;
  y[n] = maps[at] - share * maps[at + size];
}
