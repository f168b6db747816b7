// Removes what a part of the model adds: x = base, or with MEAN x = base + mean over rows of (x - base), in the columns from
// `first` to `last` - 1 of R rows of x (.., C), from the row `start` on. base: with BASE an array (R, C), the input of a
// block; without BASE, 0.
//
// A thread computes a column.

override MEAN: bool = false;
override BASE: bool = false;

struct Params { start: u32, R: u32, C: u32, first: u32, last: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> base: array<f32>;
@group(0) @binding(2) var<storage, read_write> x: array<f32>;

fn base_at(at: u32) -> f32 {
  if (BASE) { return base[at]; }
  return 0;
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let column = p.first + id.x;
  if (column >= p.last) { return; }
  var mean = 0.0;
  if (MEAN) {
    for (var row = 0u; row < p.R; row++) { mean += x[(p.start + row) * p.C + column] - base_at(row * p.C + column); }
    mean /= f32(p.R);
  }
  for (var row = 0u; row < p.R; row++) { x[(p.start + row) * p.C + column] = base_at(row * p.C + column) + mean; }
}
