// (+ weights.wgsl)
// y[i] = W_e x[i / share] + bias_e for each pair i of a token and its expert e = chosen[i]: W (E, N, K), bias (E, N), y (P, N).
// share pairs use a row of x (.., K). ORDER: column j of W_e is for column order[e, j] of x (GPTQ's act-order).
//
// A workgroup computes 4 numbers of y, as in matvec.wgsl: 16 threads share a row of W_e, take four columns at a time, and add
// their sums. The second number of the workgroup is the pair.

override BIAS: bool = false;
override ORDER: bool = false;
const LANES = 16u;

struct Params { N: u32, K: u32, share: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> x: array<f32>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;
@group(0) @binding(7) var<storage, read> chosen: array<u32>;
@group(0) @binding(8) var<storage, read> order: array<u32>;

var<workgroup> sums: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let row = group.x * (64 / LANES) + thread / LANES;
  let lane = thread % LANES;
  let expert = chosen[group.y];
  let start = group.y / p.share * p.K;
  var sum = 0.0;
  if (row < p.N) {
    for (var k = lane * 4; k < p.K; k += LANES * 4) {
      let w = weight4(expert * p.N + row, k, p.K);
      for (var c = 0u; c < 4 && k + c < p.K; c++) {
        var column = k + c;
        if (ORDER) { column = order[expert * p.K + column]; }
        sum += w[c] * x[start + column];
      }
    }
  }
  sums[thread] = sum;
  workgroupBarrier();
  if (lane == 0 && row < p.N) {
    var total = 0.0;
    for (var c = 0u; c < LANES; c++) { total += sums[thread + c]; }
    if (BIAS) { total += bias[expert * p.N + row]; }
    y[group.y * p.N + row] = total;
  }
}
