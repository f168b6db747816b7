enable subgroups;
// (+ vector.wgsl)
// y = W x + bias, and what vector.wgsl adds to it, for one row x and packed weights of 4 or 8 bits (see weights.wgsl). It is limited by memory bandwidth.
//
// A subgroup computes four numbers of y, which are the components of its vectors. A lane takes two neighbouring words of
// each of the four rows, all of one group, unpacks them in registers and multiplies them with x:
// sum w x = scale sum q x + bias sum x. It does this twice in a step, so that more loads are in flight.

override BITS: u32 = 4;
override GROUP: u32 = 64;
override SCALE_BITS: u32 = 16;

struct Params { N: u32, K: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> weights: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> biases: array<u32>;

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

// The sum of products of four columns of each row, from a bit of its word on, with four numbers of x.
fn four(words: vec4<u32>, bit: u32, a: vec4<f32>) -> vec4<f32> {
  let mask = vec4((1u << BITS) - 1);
  return vec4<f32>((words >> vec4(bit)) & mask) * a.x + vec4<f32>((words >> vec4(bit + BITS)) & mask) * a.y
       + vec4<f32>((words >> vec4(bit + 2 * BITS)) & mask) * a.z + vec4<f32>((words >> vec4(bit + 3 * BITS)) & mask) * a.w;
}

// The sums over the two words at a place in each row. rows: the indices of the rows; width: of a row, in pairs of words.
fn part(place: u32, rows: vec4<u32>, width: u32, of_norm: vec2<f32>) -> vec4<f32> {
  let here = min(place, width - 1);
  let w0 = weights[rows.x * width + here];
  let w1 = weights[rows.y * width + here];
  let w2 = weights[rows.z * width + here];
  let w3 = weights[rows.w * width + here];
  let first = vec4(w0.x, w1.x, w2.x, w3.x);
  let second = vec4(w0.y, w1.y, w2.y, w3.y);
  let at = here * (16 / BITS);  // of the vectors of x
  let a0 = input(at, p.K, of_norm);
  let a1 = input(at + 1, p.K, of_norm);
  var products = four(first, 0, a0);
  var of_x = a0 + a1;
  if (BITS == 4) {
    let a2 = input(at + 2, p.K, of_norm);
    let a3 = input(at + 3, p.K, of_norm);
    products += four(first, 16, a1) + four(second, 0, a2) + four(second, 16, a3);
    of_x += a2 + a3;
  } else {
    products += four(second, 0, a1);
  }
  let group = here * (64 / BITS) / GROUP;
  let of_row = p.K / GROUP;
  let affine = mat4x2(scale_and_bias(rows.x * of_row + group), scale_and_bias(rows.y * of_row + group),
                      scale_and_bias(rows.z * of_row + group), scale_and_bias(rows.w * of_row + group));
  let both = transpose(affine);
  return select(vec4(0.0), both[0] * products + both[1] * dot(of_x, vec4(1.0)), place < width);
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32, @builtin(subgroup_size) lanes: u32,
        @builtin(subgroup_invocation_id) lane: u32) {
  let first = ((group.x + group.y * groups.x) * (128 / lanes) + thread / lanes) * 4;
  let rows = min(vec4(first) + vec4(0u, 1, 2, 3), vec4(p.N - 1));
  let width = p.K * BITS / 64;
  let of_norm = statistics(p.K, p.eps, lane, lanes);
  var sum = vec4(0.0);
  for (var place = lane; place < width; place += 2 * lanes) {
    sum += part(place, rows, width, of_norm) + part(place + lanes, rows, width, of_norm);
  }
  sum = subgroupAdd(sum);
  if (lane < 4 && first + lane < p.N) { store(first + lane, sum[lane]); }
}
