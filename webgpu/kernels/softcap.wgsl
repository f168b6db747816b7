// Bounded logits (Bello et al. 2016): y = softcap tanh(y / softcap), number by number. A thread computes a number.

struct Params { n: u32, softcap: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n >= p.n) { return; }
  let e = exp(-2 * abs(y[n]) / p.softcap);  // WGSL's own tanh may be wrong by 1e-5
  y[n] = sign(y[n]) * p.softcap * (1 - e) / (1 + e);
}
