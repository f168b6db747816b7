// Tiles of 64 rows in shared memory, for the attention kernels with 16 x 16 threads. gpu.js puts this file before them; p, q,
// k and v are theirs.
//
// A tile has 16 columns, transposed so that four neighbours in a column are one vector. From two tiles, the thread (x, y)
// computes the 4 x 4 products of the left one's rows 4 y ... and the right one's rows 4 x ....

const DEEP = 16u;  // columns
var<workgroup> left: array<vec4<f32>, 256>;
var<workgroup> right: array<vec4<f32>, 256>;
var<workgroup> left2: array<vec4<f32>, 256>;
var<workgroup> right2: array<vec4<f32>, 256>;

// The place of column c of the i4-th four rows. The places are permuted to avoid bank conflicts.
fn place(c: u32, i4: u32) -> u32 { return c * 16 + (i4 ^ (c / 4)); }

fn outer(a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> { return mat4x4(a.x * b, a.y * b, a.z * b, a.w * b); }

// Puts a thread's four rows of four columns into a tile: 64 threads fill the left one, the next 64 the right one, and the
// others left2 and right2.
fn fill(thread: u32, rows: mat4x4<f32>) {
  let columns = transpose(rows);
  for (var c = 0u; c < 4; c++) {
    let to = place(thread % 4 * 4 + c, thread % 64 / 4);
    switch (thread / 64) {
      case 0: { left[to] = columns[c]; }
      case 1: { right[to] = columns[c]; }
      case 2: { left2[to] = columns[c]; }
      default: { right2[to] = columns[c]; }
    }
  }
}

// Four columns of a row of queries, keys or values, from `column` on; 0 if the row is not `inside`, or behind the columns.
fn q4(row: u32, head: u32, column: u32, inside: bool) -> vec4<f32> {
  if (!inside || column >= p.D) { return vec4(0.0); }
  return q[((row * p.H + head) * p.D + column) / 4];
}

fn k4(row: u32, head: u32, column: u32, inside: bool) -> vec4<f32> {
  if (!inside || column >= p.D) { return vec4(0.0); }
  return k[((row * p.KV + head) * p.D + column) / 4];
}

fn v4(row: u32, head: u32, column: u32, inside: bool) -> vec4<f32> {
  if (!inside || column >= p.D) { return vec4(0.0); }
  return v[((row * p.KV + head) * p.D + column) / 4];
}
