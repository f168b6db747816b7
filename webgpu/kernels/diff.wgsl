// The differences of pairs of heads: y (R, P, W) = O1 - lambda O2, where O1 and O2 are the neighbours in x (R, 2 P, W). lambda (1,);
// TOKENS: the sigmoid of one for each token and pair (R, P). A thread computes a number.

override TOKENS: bool = false;

struct Params { R: u32, P: u32, W: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> lambda: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n >= p.R * p.P * p.W) { return; }
  let pair = n / p.W;
  var share = lambda[0];
  if (TOKENS) { share = 1 / (1 + exp(-lambda[pair])); }
  let at = 2 * pair * p.W + n % p.W;
  y[n] = x[at] - share * x[at + p.W];
}
