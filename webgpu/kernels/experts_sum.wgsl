// y[t] = sum over i of gates[t, i] rows[t, i]: the outputs of each token's k experts, weighted: gates (R, k), y (R, C). rows
// (.., C) has the outputs of the pairs in order, or with SORTED in the rows sorted[at ...] (see experts_sort.wgsl).
//
// A thread computes a number.

override SORTED: bool = false;

struct Params { R: u32, k: u32, C: u32, at: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gates: array<f32>;
@group(0) @binding(2) var<storage, read> sorted: array<u32>;
@group(0) @binding(3) var<storage, read> rows: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n >= p.R * p.C) { return; }
  var sum = 0.0;
  for (var i = 0u; i < p.k; i++) {
    let pair = n / p.C * p.k + i;
    var row = pair;
    if (SORTED) { row = sorted[p.at + pair]; }
    sum += gates[pair] * rows[row * p.C + n % p.C];
  }
  y[n] = sum;
}
