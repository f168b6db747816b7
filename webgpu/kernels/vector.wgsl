// (+ act.wgsl)
// What lies around the product of one row, y = W x + bias, in the kernels that begin with this file. For a token that is
// written, each kernel costs more than what it computes, so that these do several things:
//
//   NORM         1: the input is norm(x), as rms in norm.wgsl, and 2: as layer; its weight and bias are norm_weight, norm_bias
//   ACTIVATES    the input is act(x) of act.wgsl. Behind the gates of KIND 3 to 5, x holds what they multiply.
//   ACCUMULATE   y += W x + bias
//
// A subgroup computes numbers of y, and for them the norm's statistics, or the activations, anew: x is short.

override BIAS: bool = false;
override ACCUMULATE: bool = false;
override NORM: u32 = 0;
override ACTIVATES: bool = false;

@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;
@group(0) @binding(7) var<storage, read> norm_weight: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read> norm_bias: array<vec4<f32>>;

// mean and 1 / sqrt(variance + eps) of x (K,), where K is a multiple of 4; for all lanes of a subgroup to call together
fn statistics(K: u32, eps: f32, lane: u32, lanes: u32) -> vec2<f32> {
  if (NORM == 0) { return vec2(0.0); }
  var mean = 0.0;
  if (NORM == 2) {
    for (var k = lane; k < K / 4; k += lanes) { mean += dot(x[k], vec4(1.0)); }
    mean = subgroupAdd(mean) / f32(K);
  }
  var squares = 0.0;
  for (var k = lane; k < K / 4; k += lanes) {
    let centered = x[k] - mean;
    squares += dot(centered, centered);
  }
  return vec2(mean, inverseSqrt(subgroupAdd(squares) / f32(K) + eps));
}

// Four numbers of the input (K,), from the index 4 k on.
fn input(k: u32, K: u32, of_norm: vec2<f32>) -> vec4<f32> {
  if (ACTIVATES) {
    if (KIND >= 3) { return act(x[k], x[k + K / 4]); }
    return act(x[k], x[k]);
  }
  if (NORM == 0) { return x[k]; }
  let normal = (x[k] - of_norm.x) * of_norm.y * norm_weight[k];
  if (NORM == 2) { return normal + norm_bias[k]; }
  return normal;
}

fn store(row: u32, sum: f32) {
  var total = sum;
  if (BIAS) { total += bias[row]; }
  if (ACCUMULATE) { total += y[row]; }
  y[row] = total;
}
