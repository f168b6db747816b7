// Tiles of 64 rows in shared memory, for the attention kernels with 16 x 16 threads. gpu.js puts this file before them.
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
