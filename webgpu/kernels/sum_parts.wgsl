// y = the sum of the parts (P, n), in which other kernels have computed y (n,); with ACCUMULATE, y += that sum.
//
// A thread computes a number of y.

override ACCUMULATE: bool = false;

struct Params { P: u32, n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> parts: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let i = (group.x + group.y * groups.x) * 64 + thread;
  if (i >= p.n) { return; }
  var sum = select(0.0, y[i], ACCUMULATE);
  for (var part = 0u; part < p.P; part++) { sum += parts[part * p.n + i]; }
  y[i] = sum;
}
