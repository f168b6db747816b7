// y[r] = s weight x[r], the share that an addend x[r] of the row w = whole[r / n] has in norm(w), without the norm's bias:
//
//   rms    s = 1 / sqrt(mean(w^2) + eps)       layer (LAYER)    s = 1 / sqrt(var(w) + eps), of x[r] - mean(x[r])
//
// The shares of all addends of a row sum to norm(w). x, y (R, C), whole (R / n, C). A workgroup computes a row.

override SIZE: u32 = 64;  // threads, a power of two
override LAYER: bool = false;

struct Params { R: u32, C: u32, n: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read> whole: array<f32>;
@group(0) @binding(3) var<storage, read> x: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

var<workgroup> sums: array<vec2<f32>, SIZE>;

// The sum of the values of all threads.
fn total(value: vec2<f32>, thread: u32) -> vec2<f32> {
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
  let of_whole = row / p.n * p.C;
  var both = vec2(0.0);
  for (var c = thread; c < p.C; c += SIZE) { both += vec2(x[start + c], whole[of_whole + c]); }
  var means = vec2(0.0);
  if (LAYER) { means = total(both, thread) / f32(p.C); }
  var squares = 0.0;
  for (var c = thread; c < p.C; c += SIZE) {
    let centered = whole[of_whole + c] - means.y;
    squares += centered * centered;
  }
  let scale = inverseSqrt(total(vec2(squares, 0.0), thread).x / f32(p.C) + p.eps);
  for (var c = thread; c < p.C; c += SIZE) { y[start + c] = (x[start + c] - means.x) * scale * weight[c]; }
}
