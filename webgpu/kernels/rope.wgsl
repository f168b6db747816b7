// Rotary positions (Su et al. 2021): y = x (B T, H, D) with each pair (i, i + R / 2) of a head's first R numbers rotated by an
// angle, whose cosine and sine are in turns (positions, R / 2). They are computed in JavaScript, since WGSL guarantees only
// three digits of a cosine. UNDO rotates back, which is the gradient. The other numbers are copied, and with R = 0 all of
// them: in this way values are written to the cache.
//
// at[0]: the position of the first of the T tokens; at[1]: the number of tokens; the others are padding. CACHE: y has a row
// for each position, not for each row of x. A thread rotates a pair, or copies two neighbours.

override UNDO: bool = false;
override CACHE: bool = false;

struct Params { rows: u32, T: u32, H: u32, D: u32, R: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> turns: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> x: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let twos = (p.D + 1) / 2;
  let n = (group.x + group.y * groups.x) * 64 + thread;
  let i = n % twos;
  let head = n / twos % p.H;
  let row = n / twos / p.H;
  let t = row % p.T;
  if (row >= p.rows || t >= at[1]) { return; }
  let position = at[0] + t;
  let source = (row * p.H + head) * p.D;
  var to = source;
  if (CACHE) { to = (position * p.H + head) * p.D; }
  let half = p.R / 2;
  if (i < half) {
    let turn = turns[position * half + i];
    var sine = turn.y;
    if (UNDO) { sine = -sine; }
    let a = x[source + i];
    let b = x[source + i + half];
    y[to + i] = a * turn.x - b * sine;
    y[to + i + half] = a * sine + b * turn.x;
  } else {
    y[to + 2 * i] = x[source + 2 * i];
    if (2 * i + 1 < p.D) { y[to + 2 * i + 1] = x[source + 2 * i + 1]; }
  }
}
