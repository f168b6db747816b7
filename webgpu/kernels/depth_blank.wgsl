// Fills the rows of x (B T, C) whose tokens a routed block did not take: with 0, or with MEAN with the mean of the sequence's
// other rows; taken (B T,). A thread takes a column of a sequence.

override MEAN: bool = false;

struct Params { B: u32, T: u32, C: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> taken: array<u32>;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n >= p.B * p.C) { return; }
  let first = n / p.C * p.T;
  var sum = 0.0;
  var count = 0.0;
  if (MEAN) {
    for (var t = 0u; t < p.T; t++) {
      if (taken[first + t] != 0) {
        sum += x[(first + t) * p.C + n % p.C];
        count += 1;
      }
    }
  }
  for (var t = 0u; t < p.T; t++) {
    if (taken[first + t] == 0) { x[(first + t) * p.C + n % p.C] = sum / max(count, 1); }
  }
}
