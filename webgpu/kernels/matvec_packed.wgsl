enable subgroups;
// y = x W^T + bias for one x and packed weights of 4 or 8 bits (see weights.wgsl), as fast as memory brings them.
//
// A subgroup makes ROWS numbers of y. A lane takes a vector of four words of each of the rows, 32 or 16 weights of one
// group, unpacks them in registers, and multiplies them with the same numbers of x, which are read once for all rows:
// sum w x = scale sum q x + bias sum x.

override BITS: u32 = 4;
override GROUP: u32 = 64;
override SCALE_BITS: u32 = 16;
override BIAS: bool = false;
const ROWS = 4u;

struct Params { N: u32, K: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> biases: array<u32>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

fn half_of(word: u32, place: u32) -> f32 {
  let both = unpack2x16float(word);
  return select(both.x, both.y, (place & 1) == 1);
}

fn scale_and_bias(group: u32) -> vec2<f32> {
  if (SCALE_BITS == 16) {
    return vec2(half_of(scales[group / 2], group), half_of(biases[group / 2], group));
  }
  return vec2(bitcast<f32>(scales[group]), bitcast<f32>(biases[group]));
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32, @builtin(subgroup_size) lanes: u32,
        @builtin(subgroup_invocation_id) lane: u32) {
  let first = ((group.x + group.y * groups.x) * (128 / lanes) + thread / lanes) * ROWS;
  let width = p.K * BITS / 128;  // vectors a row
  let each = 128 / BITS;         // weights a vector
  var sum = vec4(0.0);
  for (var at = lane; at < width; at += lanes) {
    var words: array<vec4<u32>, ROWS>;
    for (var r = 0u; r < ROWS; r++) { words[r] = weights[min(first + r, p.N - 1) * width + at]; }
    var products = vec4(0.0);
    var of_x = 0.0;
    for (var c = 0u; c < 4; c++) {
      let a = x[at * each / 4 + c * each / 16];
      if (BITS == 4) {
        let b = x[at * each / 4 + c * 2 + 1];
        let even = vec4(a.x, a.z, b.x, b.z);
        let odd = vec4(a.y, a.w, b.y, b.w);
        of_x += dot(even + odd, vec4(1.0));
        for (var r = 0u; r < ROWS; r++) {
          products[r] += dot(vec4<f32>(unpack4xU8(words[r][c] & 0x0f0f0f0f)), even)
                       + dot(vec4<f32>(unpack4xU8((words[r][c] >> 4) & 0x0f0f0f0f)), odd);
        }
      } else {
        of_x += dot(a, vec4(1.0));
        for (var r = 0u; r < ROWS; r++) { products[r] += dot(vec4<f32>(unpack4xU8(words[r][c])), a); }
      }
    }
    for (var r = 0u; r < ROWS; r++) {
      let affine = scale_and_bias(min(first + r, p.N - 1) * (p.K / GROUP) + at * each / GROUP);
      sum[r] += affine.x * products[r] + affine.y * of_x;
    }
  }
  sum = subgroupAdd(sum);
  if (lane < ROWS && first + lane < p.N) {
    var total = sum[lane];
    if (BIAS) { total += bias[first + lane]; }
    y[first + lane] = total;
  }
}
