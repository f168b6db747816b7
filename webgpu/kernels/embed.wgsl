// (+ weights.wgsl)
// y[row] = factor E[token of the row], and with LEARNED + P[position]: tokens (R,), E (V, C) of any format, P (room, C).
//
// E holds the rows from `first` on of `rows` tokens: rows of y for other tokens are left as they are. at[0]: the position of
// the first of each T tokens. A thread computes four columns of a row.

override LEARNED: bool = false;

struct Params { R: u32, T: u32, C: u32, factor: f32, first: u32, rows: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(4) var<storage, read> at: array<u32>;
@group(0) @binding(5) var<storage, read> tokens: array<u32>;
@group(0) @binding(6) var<storage, read> positions: array<f32>;
@group(0) @binding(7) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let fours = (p.C + 3) / 4;
  let n = (group.x + group.y * groups.x) * 64 + thread;
  let row = n / fours;
  let column = n % fours * 4;
  if (row >= p.R) { return; }
  let token = tokens[row] - p.first;  // a large number, if it is less than `first`
  if (token >= p.rows) { return; }
  let four = weight4(token, column, p.C);
  for (var c = 0u; c < 4 && column + c < p.C; c++) {
    var value = p.factor * four[c];
    if (LEARNED) { value += positions[(at[0] + row % p.T) * p.C + column + c]; }
    y[row * p.C + column + c] = value;
  }
}
