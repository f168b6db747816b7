// Clipping and an update of AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019), as in train.py, of parameters x (n,) with
// gradients g. The first `decayed` parameters are those of matrices.
//
//   g = g min(1, clip / (length of g + 1e-6));   x = x (1 - lr decay) for matrices
//   m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   x = x - lr m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + 1e-8)
//
// squares: the sum of g^2, by sum_squares.wgsl. now: lr, 1 - b1^t and sqrt(1 - b2^t) of this update. moments: m (n,), then
// v (n,). A thread updates a parameter.

struct Params { n: u32, decayed: u32, clip: f32, decay: f32, b1: f32, b2: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> now: array<f32>;
@group(0) @binding(2) var<storage, read> squares: array<f32>;
@group(0) @binding(3) var<storage, read> g: array<f32>;
@group(0) @binding(4) var<storage, read_write> moments: array<f32>;
@group(0) @binding(5) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let i = (group.x + group.y * groups.x) * 64 + thread;
  if (i >= p.n) { return; }
  var shrink = 1.0;
  if (p.clip > 0) { shrink = min(1.0, p.clip / (sqrt(squares[0]) + 1e-6)); }
  let gradient = g[i] * shrink;
  var value = x[i];
  if (i < p.decayed) { value *= 1 - now[0] * p.decay; }
  let m = p.b1 * moments[i] + (1 - p.b1) * gradient;
  let v = p.b2 * moments[p.n + i] + (1 - p.b2) * gradient * gradient;
  moments[i] = m;
  moments[p.n + i] = v;
  x[i] = value - now[0] * (m / now[1]) / (sqrt(v) / now[2] + 1e-8);
}
