// (+ weights.wgsl)
// y = x W^T + bias: x (M, K), W (N, K), y (M, N).
//
// TRANSPOSE_X: x is stored (K, M). TRANSPOSE_W: W is stored (K, N). ACCUMULATE: the product is added to y. With these
// settings the kernel also computes both gradients: dx = dy W, and dW = dy^T x, where x is bound as the weights.
// WHOLE: N and K are multiples of 4, and with TRANSPOSE_X M is one too, so that no bounds are checked as numbers are read,
// which is several times as fast on a processor. Rows of x from M on, which then are read, only give numbers that are not
// written.
// A thread computes 4 x 4 numbers of y, from 4 rows of x and 4 of W, four columns at a time.

override TRANSPOSE_X: bool = false;
override TRANSPOSE_W: bool = false;
override ACCUMULATE: bool = false;
override BIAS: bool = false;
override WHOLE: bool = false;

struct Params { M: u32, N: u32, K: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

fn x_at(at: u32) -> f32 { return x[at / 4][at % 4]; }

// x[row, column ... column + 3] of an array (height, width), and 0 outside it.
fn x4(row: u32, column: u32, height: u32, width: u32) -> vec4<f32> {
  let at = row * width + column;
  if (WHOLE) { return x[at / 4]; }
  if (row < height && at % 4 == 0 && column + 4 <= width) { return x[at / 4]; }
  let inside = (vec4(column) + vec4(0u, 1, 2, 3) < vec4(width)) & vec4(row < height);
  return select(vec4(0.0), vec4(x_at(at), x_at(at + 1), x_at(at + 2), x_at(at + 3)), inside);
}

fn x_block(i: u32, k: u32) -> mat4x4<f32> {  // a vector is a row of x
  if (TRANSPOSE_X) {
    return transpose(mat4x4(x4(k, i, p.K, p.M), x4(k + 1, i, p.K, p.M), x4(k + 2, i, p.K, p.M), x4(k + 3, i, p.K, p.M)));
  }
  return mat4x4(x4(i, k, p.M, p.K), x4(i + 1, k, p.M, p.K), x4(i + 2, k, p.M, p.K), x4(i + 3, k, p.M, p.K));
}

fn w4(row: u32, column: u32) -> vec4<f32> {
  let width = select(p.K, p.N, TRANSPOSE_W);
  if (WHOLE && BITS == 32) { return bitcast<vec4<f32>>(weights[(row * width + column) / 4]); }
  if (WHOLE) { return weight4(row, column, width); }
  if (TRANSPOSE_W) { return weight4_inside(row, column, p.K, p.N); }
  return weight4_inside(row, column, p.N, p.K);
}

fn w_block(j: u32, k: u32) -> mat4x4<f32> {  // a vector is a row of W
  if (TRANSPOSE_W) {
    return transpose(mat4x4(w4(k, j), w4(k + 1, j), w4(k + 2, j), w4(k + 3, j)));
  }
  return mat4x4(w4(j, k), w4(j + 1, k), w4(j + 2, k), w4(j + 3, k));
}

@compute @workgroup_size(8, 8)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let i = id.y * 4;
  let j = id.x * 4;
  if (i >= p.M || j >= p.N) { return; }
  var sum = mat4x4<f32>();
  for (var k = 0u; k < p.K; k += 4) {
    let a = x_block(i, k);
    let b = w_block(j, k);
    sum += mat4x4(a[0] * b, a[1] * b, a[2] * b, a[3] * b);
  }
  for (var r = 0u; r < 4; r++) {
    for (var c = 0u; c < 4; c++) {
      if (i + r < p.M && j + c < p.N) {
        let at = (i + r) * p.N + j + c;
        var value = sum[r][c];
        if (BIAS) { value += bias[j + c]; }
        if (ACCUMULATE) { value += y[at]; }
        y[at] = value;
      }
    }
  }
}
