// Rotary positions (Su et al. 2021): y = x (B T, H, D) with each pair (i, i + D / 2) of a head rotated by an angle, whose
// cosine and sine are in turns (positions, D / 2). They are computed in JavaScript, since WGSL guarantees only three digits
// of a cosine. UNDO rotates back, which is the gradient. Without TURN y is x: in this way values are written to the cache.
//
// at[0]: the position of the first of the T tokens; at[1]: the number of tokens; the others are padding. CACHE: y has a row
// for each position, not for each row of x. A thread rotates a pair.

override TURN: bool = true;
override UNDO: bool = false;
override CACHE: bool = false;

struct Params { rows: u32, T: u32, H: u32, D: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> turns: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> x: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let pairs = (p.D + 1) / 2;
  let n = (group.x + group.y * groups.x) * 64 + thread;
  let i = n % pairs;
  let head = n / pairs % p.H;
  let row = n / pairs / p.H;
  let t = row % p.T;
  if (row >= p.rows || t >= at[1]) { return; }
  let position = at[0] + t;
  let source = (row * p.H + head) * p.D + i;
  var to = source;
  if (CACHE) { to = (position * p.H + head) * p.D + i; }
  if (TURN) {
    let turn = turns[position * pairs + i];
    var sine = turn.y;
    if (UNDO) { sine = -sine; }
    let a = x[source];
    let b = x[source + pairs];
    y[to] = a * turn.x - b * sine;
    y[to + pairs] = a * sine + b * turn.x;
  } else {
    y[to] = x[source];
    if (i + pairs < p.D) { y[to + pairs] = x[source + pairs]; }
  }
}
