// The factors of what a routed block changes in R tokens, gate (R,), from its router's r (R,): r for the tokens that are chosen,
// those with likely > threshold (1,), and 0 for the others; SOFT: sigmoid(r) for all.
//
// at[0]: the position of the first of each T tokens; at[1]: how many are not padding. taken: 1 for a chosen token, 0 for
// another, in the token's row, or with CACHE in the row of its position. A thread takes a token.

override SOFT: bool = false;
override CACHE: bool = false;

struct Params { R: u32, T: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> threshold: array<f32>;
@group(0) @binding(3) var<storage, read> likely: array<f32>;
@group(0) @binding(4) var<storage, read> r: array<f32>;
@group(0) @binding(5) var<storage, read_write> gate: array<f32>;
@group(0) @binding(6) var<storage, read_write> taken: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let row = (group.x + group.y * groups.x) * 64 + thread;
  if (row >= p.R) { return; }
  if (SOFT) {
    gate[row] = 1 / (1 + exp(-r[row]));
    return;
  }
  let is_chosen = likely[row] > threshold[0];
  gate[row] = select(0.0, r[row], is_chosen);
  let t = row % p.T;
  if (t >= at[1]) { return; }
  var to = row;
  if (CACHE) { to = at[0] + t; }
  taken[to] = u32(is_chosen);
}
