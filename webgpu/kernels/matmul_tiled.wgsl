// (+ weights.wgsl)
// matmul.wgsl, with its settings and arguments, for devices whose workgroups have fast shared memory.
//
// 16 x 16 threads compute a tile of SIDE x SIDE numbers of y. They load tiles of 16 columns of x and W into shared memory,
// transposed so that four neighbours in a column are one vector, and load the next tiles while they compute with these. A
// thread computes 4 x 4 numbers if SIDE is 64; if it is 128, four such blocks, 64 rows and columns apart.
// WHOLE: M and N are multiples of SIDE and K of 16, so that no bounds are checked, which is a tenth faster.
// PARTS: the columns of x and W are divided among so many workgroups a tile, so that a product with few tiles employs a large
// card too. Then y is (PARTS, M, N), which sum_parts.wgsl sums, and ACCUMULATE is off.

override SIDE: u32 = 64;
override WHOLE: bool = false;
override TRANSPOSE_X: bool = false;
override TRANSPOSE_W: bool = false;
override ACCUMULATE: bool = false;
override BIAS: bool = false;
override PARTS: u32 = 1;
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

fn write(sum: mat4x4<f32>, part: u32, i: u32, j: u32) {
  for (var r = 0u; r < 4; r++) {
    for (var c = 0u; c < 4; c++) {
      if (i + r < p.M && j + c < p.N) {
        let at = (part * p.M + i + r) * p.N + j + c;
        var value = sum[r][c];
        if (BIAS && part == 0) { value += bias[j + c]; }
        if (ACCUMULATE) { value += y[at]; }
        y[at] = value;
      }
    }
  }
}

// Adds the products of column k of both tiles.
fn add_products(sums: ptr<function, array<mat4x4<f32>, 4>>, k: u32, i4: u32, j4: u32) {
  let a = x_tile[place(k, i4)];
  let b = w_tile[place(k, j4)];
  (*sums)[0] += outer(a, b);
  if (SIDE == 128) {
    let a1 = x_tile[place(k, i4 + 16)];
    let b1 = w_tile[place(k, j4 + 16)];
    (*sums)[1] += outer(a, b1);
    (*sums)[2] += outer(a1, b);
    (*sums)[3] += outer(a1, b1);
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
  let depth = (p.K + PARTS * DEEP - 1) / (PARTS * DEEP) * DEEP;
  let begin = min(p.K, tile.z * depth);
  let end = min(p.K, begin + depth);
  let block = (thread % SIDE) / 4;
  let deep = thread % 4 * 4;
  var next = mat4x4<f32>();
  if (fetches_x) { next = x_block(i + block * 4, begin + deep); }
  if (fetches_w) { next = w_block(j + block * 4, begin + deep); }
  var sums = array<mat4x4<f32>, 4>();
  for (var start = begin; start < end; start += DEEP) {
    workgroupBarrier();
    for (var c = 0u; c < 4; c++) {
      if (fetches_x) { x_tile[place(deep + c, block)] = next[c]; }
      if (fetches_w) { w_tile[place(deep + c, block)] = next[c]; }
    }
    workgroupBarrier();
    if (start + DEEP < end) {
      if (fetches_x) { next = x_block(i + block * 4, start + DEEP + deep); }
      if (fetches_w) { next = w_block(j + block * 4, start + DEEP + deep); }
    }
    // Written out, since compilers keep a loop, which takes a third longer.
    add_products(&sums, 0, local.y, local.x);
    add_products(&sums, 1, local.y, local.x);
    add_products(&sums, 2, local.y, local.x);
    add_products(&sums, 3, local.y, local.x);
    add_products(&sums, 4, local.y, local.x);
    add_products(&sums, 5, local.y, local.x);
    add_products(&sums, 6, local.y, local.x);
    add_products(&sums, 7, local.y, local.x);
    add_products(&sums, 8, local.y, local.x);
    add_products(&sums, 9, local.y, local.x);
    add_products(&sums, 10, local.y, local.x);
    add_products(&sums, 11, local.y, local.x);
    add_products(&sums, 12, local.y, local.x);
    add_products(&sums, 13, local.y, local.x);
    add_products(&sums, 14, local.y, local.x);
    add_products(&sums, 15, local.y, local.x);
  }
  write(sums[0], tile.z, i + local.y * 4, j + local.x * 4);
  if (SIDE == 128) {
    write(sums[1], tile.z, i + local.y * 4, j + local.x * 4 + 64);
    write(sums[2], tile.z, i + local.y * 4 + 64, j + local.x * 4);
    write(sums[3], tile.z, i + local.y * 4 + 64, j + local.x * 4 + 64);
  }
}
