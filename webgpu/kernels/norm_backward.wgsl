// The gradient dx of norm.wgsl's x from dy, that of its y, for each row. With n = (x - mean) s, s = 1 / sqrt(... + eps) and
// g = dy weight,
//
//   rms    dx = s (g - n mean(g n))                       layer (LAYER)    dx = s (g - mean(g) - n mean(g n))
//
// and statistics (R, 2), the mean and s of each row, for column_sum.wgsl. ADD: the gradient is added to dx, which already
// holds the gradient of the residual connection. A workgroup computes a row.

override SIZE: u32 = 64;  // threads
override LAYER: bool = false;
override ADD: bool = false;

struct Params { R: u32, C: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> dy: array<f32>;
@group(0) @binding(4) var<storage, read_write> dx: array<f32>;
@group(0) @binding(5) var<storage, read_write> statistics: array<vec2<f32>>;

var<workgroup> sums: array<vec2<f32>, SIZE>;

fn total(value: vec2<f32>, thread: u32) -> vec2<f32> {
  workgroupBarrier();
  sums[thread] = value;
  workgroupBarrier();
  var sum = vec2(0.0);
  for (var i = 0u; i < SIZE; i++) { sum += sums[i]; }
  return sum;
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= p.R) { return; }
  let start = row * p.C;
  let width = f32(p.C);
  var mean = 0.0;
  if (LAYER) {
    var sum = 0.0;
    for (var c = thread; c < p.C; c += SIZE) { sum += x[start + c]; }
    mean = total(vec2(sum, 0), thread).x / width;
  }
  var squares = 0.0;
  for (var c = thread; c < p.C; c += SIZE) { squares += (x[start + c] - mean) * (x[start + c] - mean); }
  let scale = inverseSqrt(total(vec2(squares, 0), thread).x / width + p.eps);
  var sum = vec2(0.0);
  for (var c = thread; c < p.C; c += SIZE) {
    let g = dy[start + c] * weight[c];
    sum += vec2(g, g * (x[start + c] - mean) * scale);
  }
  var means = total(sum, thread) / width;
  if (!LAYER) { means.x = 0; }
  for (var c = thread; c < p.C; c += SIZE) {
    let n = (x[start + c] - mean) * scale;
    var value = scale * (dy[start + c] * weight[c] - means.x - n * means.y);
    if (ADD) { value += dx[start + c]; }
    dx[start + c] = value;
  }
  if (thread == 0) { statistics[row] = vec2(mean, scale); }
}
