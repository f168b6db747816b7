// y[r, first + c] = x[r, c]: x (R, C) becomes C of the N columns of y (R, N). A thread copies a number.

struct Params { R: u32, C: u32, N: u32, first: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n < p.R * p.C) { y[n / p.C * p.N + p.first + n % p.C] = x[n]; }
}
