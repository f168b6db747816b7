// The sum of squares of g (n,), in parts, one for each workgroup.

override SIZE: u32 = 256;  // threads

struct Params { n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> g: array<f32>;
@group(0) @binding(2) var<storage, read_write> parts: array<f32>;

var<workgroup> sums: array<f32, SIZE>;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  var sum = 0.0;
  for (var i = group.x * SIZE + thread; i < p.n; i += groups.x * SIZE) { sum += g[i] * g[i]; }
  sums[thread] = sum;
  workgroupBarrier();
  if (thread == 0) {
    var whole = 0.0;
    for (var i = 0u; i < SIZE; i++) { whole += sums[i]; }
    parts[group.x] = whole;
  }
}
