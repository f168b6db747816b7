// (+ weights.wgsl)
// y = x W^T + bias for one row x (K,), with W (N, K) and y (N,).
//
// 64 threads compute 4 numbers of y. 16 threads share a row of W, take four columns at a time, and add their sums.

override BIAS: bool = false;
const LANES = 16u;

struct Params { N: u32, K: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

var<workgroup> sums: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let row = (group.x + group.y * groups.x) * (64 / LANES) + thread / LANES;
  let lane = thread % LANES;
  var sum = 0.0;
  if (row < p.N) {
    for (var k = lane * 4; k < p.K; k += LANES * 4) {
      let w = weight4(row, k, p.K);
      if (k + 4 <= p.K) {
        sum += dot(w, x[k / 4]);
      } else {
        for (var c = 0u; k + c < p.K; c++) { sum += w[c] * x[k / 4][c]; }
      }
    }
  }
  sums[thread] = sum;
  workgroupBarrier();
  if (lane == 0 && row < p.N) {
    var total = 0.0;
    for (var c = 0u; c < LANES; c++) { total += sums[thread + c]; }
    if (BIAS) { total += bias[row]; }
    y[row] = total;
  }
}
