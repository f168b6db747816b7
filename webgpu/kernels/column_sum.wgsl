// Sums over the rows of dy (R, C), which are the gradient of a bias; with NORM, of dy (x - mean) s, which are the gradient
// of a norm's weight (statistics: see norm_backward.wgsl).
//
// A workgroup computes 16 columns, each with 16 threads. With P rows of workgroups, each takes a share of the rows of dy, and
// sums is (P, C), which sum_parts.wgsl sums.

override NORM: bool = false;

struct Params { R: u32, C: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read> statistics: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> sums: array<f32>;

var<workgroup> parts: array<f32, 256>;

@compute @workgroup_size(16, 16)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_id) local: vec3<u32>) {
  let column = group.x * 16 + local.x;
  var sum = 0.0;
  if (column < p.C) {
    for (var row = group.y * 16 + local.y; row < p.R; row += groups.y * 16) {
      let at = row * p.C + column;
      if (NORM) {
        sum += dy[at] * (x[at] - statistics[row].x) * statistics[row].y;
      } else {
        sum += dy[at];
      }
    }
  }
  parts[local.y * 16 + local.x] = sum;
  workgroupBarrier();
  if (local.y == 0 && column < p.C) {
    var whole = 0.0;
    for (var i = 0u; i < 16; i++) { whole += parts[i * 16 + local.x]; }
    sums[group.y * p.C + column] = whole;
  }
}
