// (+ weights.wgsl)
// y[r] = W_e x + bias_e for rows r in blocks of 32, each of one expert e: W (E, N, K), bias (E, N), y (blocks 32, N). sorted: see
// experts_sort.wgsl. x (.., K) has a row for each `share` pairs, of which row r's is used; share = 0: a row for each r. ORDER:
// column j of W_e is for column order[e, j] of x (GPTQ's act-order). Rows without a pair may hold any numbers.
//
// A workgroup computes 32 columns of a block; a thread 4 x 4 numbers, from 4 rows of x and 4 of W_e, four columns at a time.

override BIAS: bool = false;
override ORDER: bool = false;

struct Params { N: u32, K: u32, E: u32, blocks: u32, share: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> x: array<f32>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;
@group(0) @binding(7) var<storage, read> sorted: array<u32>;
@group(0) @binding(8) var<storage, read> order: array<u32>;

const ROWS = 32u;
const EMPTY = 0xffffffffu;

@compute @workgroup_size(8, 8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) id: vec3<u32>) {
  let expert = sorted[group.y];
  let j = group.x * 32 + id.x * 4;
  let row = group.y * ROWS + id.y * 4;
  if (expert == p.E || j >= p.N || sorted[p.blocks + row] == EMPTY) { return; }
  var starts = vec4<u32>();  // where the four rows of x begin
  for (var r = 0u; r < 4; r++) {
    let pair = sorted[p.blocks + row + r];
    if (p.share == 0) { starts[r] = (row + r) * p.K; }
    else if (pair != EMPTY) { starts[r] = pair / p.share * p.K; }
  }
  var sum = mat4x4<f32>();
  for (var k = 0u; k < p.K; k += 4) {
    var w = mat4x4<f32>();   // a vector is a row of W_e
    for (var c = 0u; c < 4 && j + c < p.N; c++) { w[c] = weight4(expert * p.N + j + c, k, p.K); }
    for (var c = 0u; c < 4 && k + c < p.K; c++) {
      var column = k + c;
      if (ORDER) { column = order[expert * p.K + column]; }
      let w_c = vec4(w[0][c], w[1][c], w[2][c], w[3][c]);
      for (var r = 0u; r < 4; r++) { sum[r] += x[starts[r] + column] * w_c; }
    }
  }
  for (var r = 0u; r < 4; r++) {
    for (var c = 0u; c < 4 && j + c < p.N; c++) {
      var value = sum[r][c];
      if (BIAS) { value += bias[expert * p.N + j + c]; }
      y[(row + r) * p.N + j + c] = value;
    }
  }
}
