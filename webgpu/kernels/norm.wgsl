// y = norm(x) weight + bias for each row of x (R, C). With ADD, first x += more, the output of attention or an MLP.
//
//   rms    x / sqrt(mean(x^2) + eps)                      layer (LAYER)    (x - mean(x)) / sqrt(var(x) + eps)
//
// A workgroup computes a row.

override SIZE: u32 = 64;  // threads, a power of two
override LAYER: bool = false;
override ADD: bool = false;
override BIAS: bool = false;

struct Params { R: u32, C: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read> more: array<f32>;
@group(0) @binding(4) var<storage, read_write> x: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

var<workgroup> sums: array<f32, SIZE>;

// The sum of the values of all threads.
fn total(value: f32, thread: u32) -> f32 {
  workgroupBarrier();
  sums[thread] = value;
  for (var half = SIZE / 2; half > 0; half /= 2) {
    workgroupBarrier();
    if (thread < half) { sums[thread] += sums[thread + half]; }
  }
  workgroupBarrier();
  return sums[0];
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= p.R) { return; }
  let start = row * p.C;
  var sum = 0.0;
  for (var c = thread; c < p.C; c += SIZE) {
    if (ADD) { x[start + c] += more[start + c]; }
    sum += x[start + c];
  }
  var mean = 0.0;
  if (LAYER) { mean = total(sum, thread) / f32(p.C); }
  var squares = 0.0;
  for (var c = thread; c < p.C; c += SIZE) {
    let centered = x[start + c] - mean;
    squares += centered * centered;
  }
  let scale = inverseSqrt(total(squares, thread) / f32(p.C) + p.eps);
  for (var c = thread; c < p.C; c += SIZE) {
    var value = (x[start + c] - mean) * scale * weight[c];
    if (BIAS) { value += bias[c]; }
    y[start + c] = value;
  }
}
