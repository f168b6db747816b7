// found[r] = x[r] . y[r / n]: x (R, C), y (R / n, C), found (R,). A workgroup computes a row.

override SIZE: u32 = 64;  // threads, a power of two

struct Params { R: u32, C: u32, n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> y: array<f32>;
@group(0) @binding(3) var<storage, read_write> found: array<f32>;

var<workgroup> sums: array<f32, SIZE>;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= p.R) { return; }
  var sum = 0.0;
  for (var c = thread; c < p.C; c += SIZE) { sum += x[row * p.C + c] * y[row / p.n * p.C + c]; }
  sums[thread] = sum;
  for (var half = SIZE / 2; half > 0; half /= 2) {
    workgroupBarrier();
    if (thread < half) { sums[thread] += sums[thread + half]; }
  }
  if (thread == 0) { found[row] = sums[0]; }
}
