enable subgroups;
// (+ weights.wgsl)
// matvec.wgsl, with its arguments. A subgroup, of any size, computes a number of y.

override BIAS: bool = false;

struct Params { N: u32, K: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32, @builtin(subgroup_size) lanes: u32,
        @builtin(subgroup_invocation_id) lane: u32) {
  let row = (group.x + group.y * groups.x) * (128 / lanes) + thread / lanes;
  var sum = 0.0;
  if (row < p.N) {
    for (var k = lane * 4; k < p.K; k += lanes * 4) {
      let w = weight4(row, k, p.K);
      if (k + 4 <= p.K) {
        sum += dot(w, x[k / 4]);
      } else {
        for (var c = 0u; k + c < p.K; c++) { sum += w[c] * x[k / 4][c]; }
      }
    }
  }
  sum = subgroupAdd(sum);
  if (lane == 0 && row < p.N) {
    if (BIAS) { sum += bias[row]; }
    y[row] = sum;
  }
}
