enable subgroups;
// (+ weights.wgsl vector.wgsl)
// matvec.wgsl, with its arguments and those of vector.wgsl. A subgroup, of any size, computes a number of y.

struct Params { N: u32, K: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32, @builtin(subgroup_size) lanes: u32,
        @builtin(subgroup_invocation_id) lane: u32) {
  let row = (group.x + group.y * groups.x) * (128 / lanes) + thread / lanes;
  let of_norm = statistics(p.K, p.eps, lane, lanes);
  var sum = 0.0;
  if (row < p.N) {
    for (var k = lane * 4; k < p.K; k += lanes * 4) {
      let w = weight4(row, k, p.K);
      let a = input(k / 4, p.K, of_norm);
      if (k + 4 <= p.K) {
        sum += dot(w, a);
      } else {
        for (var c = 0u; k + c < p.K; c++) { sum += w[c] * a[c]; }
      }
    }
  }
  sum = subgroupAdd(sum);
  if (lane == 0 && row < p.N) { store(row, sum); }
}
