// Reads a matrix of weights (rows, width) in the format of the checkpoint. BITS:
//   32          float32
//   16          float16, two in a word
//   2 ... 6, 8  packed integers in MLX's layout: a row is a stream of integers q with so many bits each, low bits first,
//               and w = scale q + bias, with a scale and a bias for each GROUP numbers of a row (SCALE_BITS: 16 or 32)
// gpu.js puts this file before the kernels that read weights. The bindings 1, 2 and 3 are the matrix's.

override BITS: u32 = 32;
override GROUP: u32 = 64;
override SCALE_BITS: u32 = 16;

@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;  // by four, so that loads are wide
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> biases: array<u32>;

fn word_at(at: u32) -> u32 { return weights[at / 4][at % 4]; }

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

// Four neighbours in a row, from a column that is a multiple of 4. Behind the end of the row the numbers are undefined.
fn weight4(row: u32, column: u32, width: u32) -> vec4<f32> {
  let at = row * width + column;
  if (BITS == 32) {
    if (at % 4 == 0) { return bitcast<vec4<f32>>(weights[at / 4]); }
    return bitcast<vec4<f32>>(vec4(word_at(at), word_at(at + 1), word_at(at + 2), word_at(at + 3)));
  }
  if (BITS == 16) {
    let word = at / 2;
    if (at % 2 == 0) { return vec4(unpack2x16float(word_at(word)), unpack2x16float(word_at(word + 1))); }
    let middle = unpack2x16float(word_at(word + 1));
    return vec4(half_of(word_at(word), 1), middle, half_of(word_at(word + 2), 0));
  }
  let bit = column * BITS;
  let word = row * (width * BITS / 32) + bit / 32;
  let shift = bit % 32;
  var stream = word_at(word) >> shift;
  if (shift + 4 * BITS > 32) { stream |= word_at(word + 1) << (32 - shift); }
  let places = vec4(0, BITS, 2 * BITS, 3 * BITS) % 32;  // %: this line is also compiled for 16 and 32 BITS
  let q = (vec4(stream) >> places) & vec4((1u << (BITS % 32)) - 1);
  let affine = scale_and_bias(row * (width / GROUP) + column / GROUP);
  return affine.x * vec4<f32>(q) + affine.y;
}

// As weight4(), but 0 outside of a matrix (height, width): memory there may hold NaN, which stays NaN when multiplied by 0.
fn weight4_inside(row: u32, column: u32, height: u32, width: u32) -> vec4<f32> {
  let inside = (vec4(column) + vec4(0u, 1, 2, 3) < vec4(width)) & vec4(row < height);
  return select(vec4(0.0), weight4(row, column, width), inside);
}
