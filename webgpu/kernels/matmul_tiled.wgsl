// (+ weights.wgsl)
// matmul.wgsl, with its settings and arguments, for devices whose workgroups have fast shared memory.
//
// 16 x 16 threads compute a tile of SIDE x SIDE numbers of y. They load tiles of 16 columns of x and W into shared memory,
// transposed so that four neighbours in a column are one vector, and load the next tiles while they compute with these. A
// thread computes 4 x 4 numbers if SIDE is 64; if it is 128, four such blocks, 64 rows and columns apart.
// WHOLE: M and N are multiples of SIDE and K of 16, so that no bounds are checked, which is a tenth faster.

override SIDE: u32 = 64;
override WHOLE: bool = false;
override TRANSPOSE_X: bool = false;
override TRANSPOSE_W: bool = false;
override ACCUMULATE: bool = false;
override BIAS: bool = false;
const DEEP = 16u;

struct Params { M: u32, N: u32, K: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

var<workgroup> x_tile: array<vec4<f32>, DEEP * SIDE / 4>;
var<workgroup> w_tile: array<vec4<f32>, DEEP * SIDE / 4>;

// The index of column k of four rows of a tile, from row 4 i4 on. The indices are permuted to avoid bank conflicts.
fn place(k: u32, i4: u32) -> u32 { return k * (SIDE / 4) + (i4 ^ (k / 4)); }

fn x_at(at: u32) -> f32 { return x[at / 4][at % 4]; }

fn x4(row: u32, column: u32, height: u32, width: u32) -> vec4<f32> {
  let at = row * width + column;
  if (WHOLE) { return x[at / 4]; }
  if (row < height && at % 4 == 0 && column + 4 <= width) { return x[at / 4]; }
  let inside = (vec4(column) + vec4(0u, 1, 2, 3) < vec4(width)) & vec4(row < height);
  return select(vec4(0.0), vec4(x_at(at), x_at(at + 1), x_at(at + 2), x_at(at + 3)), inside);
}

fn x_block(i: u32, k: u32) -> mat4x4<f32> {  // a vector is a column of x
  if (TRANSPOSE_X) {
    return mat4x4(x4(k, i, p.K, p.M), x4(k + 1, i, p.K, p.M), x4(k + 2, i, p.K, p.M), x4(k + 3, i, p.K, p.M));
  }
  return transpose(mat4x4(x4(i, k, p.M, p.K), x4(i + 1, k, p.M, p.K), x4(i + 2, k, p.M, p.K), x4(i + 3, k, p.M, p.K)));
}

fn w4(row: u32, column: u32) -> vec4<f32> {
  if (WHOLE && BITS == 32) { return bitcast<vec4<f32>>(weights[(row * select(p.K, p.N, TRANSPOSE_W) + column) / 4]); }
  if (TRANSPOSE_W) { return weight4_inside(row, column, p.K, p.N); }
  return weight4_inside(row, column, p.N, p.K);
}

fn w_block(j: u32, k: u32) -> mat4x4<f32> {
  if (TRANSPOSE_W) {
    return mat4x4(w4(k, j), w4(k + 1, j), w4(k + 2, j), w4(k + 3, j));
  }
  return transpose(mat4x4(w4(j, k), w4(j + 1, k), w4(j + 2, k), w4(j + 3, k)));
}

fn outer(a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> { return mat4x4(a.x * b, a.y * b, a.z * b, a.w * b); }

fn write(sum: mat4x4<f32>, i: u32, j: u32) {
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

@compute @workgroup_size(16, 16)
fn main(@builtin(workgroup_id) tile: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let i = tile.y * SIDE;
  let j = tile.x * SIDE;
  // SIDE threads load a block of 4 x 4 numbers of x each, the next SIDE threads one of W.
  let fetches_x = thread < SIDE;
  let fetches_w = !fetches_x && thread < 2 * SIDE;
  let block = (thread % SIDE) / 4;
  let deep = thread % 4 * 4;
  var next = mat4x4<f32>();
  if (fetches_x) { next = x_block(i + block * 4, deep); }
  if (fetches_w) { next = w_block(j + block * 4, deep); }
  var sum00 = mat4x4<f32>();
  var sum01 = mat4x4<f32>();
  var sum10 = mat4x4<f32>();
  var sum11 = mat4x4<f32>();
  for (var start = 0u; start < p.K; start += DEEP) {
    workgroupBarrier();
    for (var c = 0u; c < 4; c++) {
      if (fetches_x) { x_tile[place(deep + c, block)] = next[c]; }
      if (fetches_w) { w_tile[place(deep + c, block)] = next[c]; }
    }
    workgroupBarrier();
    if (start + DEEP < p.K) {
      if (fetches_x) { next = x_block(i + block * 4, start + DEEP + deep); }
      if (fetches_w) { next = w_block(j + block * 4, start + DEEP + deep); }
    }
    for (var k = 0u; k < DEEP; k++) {
      let a = x_tile[place(k, local.y)];
      let b = w_tile[place(k, local.x)];
      sum00 += outer(a, b);
      if (SIDE == 128) {
        let a1 = x_tile[place(k, local.y + 16)];
        let b1 = w_tile[place(k, local.x + 16)];
        sum01 += outer(a, b1);
        sum10 += outer(a1, b);
        sum11 += outer(a1, b1);
      }
    }
  }
  write(sum00, i + local.y * 4, j + local.x * 4);
  if (SIDE == 128) {
    write(sum01, i + local.y * 4, j + local.x * 4 + 64);
    write(sum10, i + local.y * 4 + 64, j + local.x * 4);
    write(sum11, i + local.y * 4 + 64, j + local.x * 4 + 64);
  }
}
