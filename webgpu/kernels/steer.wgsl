// Changes states while a text is written: in the rows r of x (R, C) whose positions at[0] + r are from dial.first to
// dial.last - 1, and in the columns c from `left` to `right` - 1,
//
//   x[r, c] = dial.keep x[r, c] + dial.strength state[c]
//
// keep 1 adds a direction, keep 0 with strength 1 pastes a state, and without STATE, keep 0 switches a part off. The dial is a
// buffer and not a part of the uniforms, so that all plans that write a text see it change at once.
//
// A thread computes a number.

override STATE: bool = false;

struct Params { R: u32, C: u32, left: u32, right: u32 }
struct Dial { keep: f32, strength: f32, first: f32, last: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> at: array<u32>;
@group(0) @binding(2) var<storage, read> dial: Dial;
@group(0) @binding(3) var<storage, read> state: array<f32>;
@group(0) @binding(4) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  let width = p.right - p.left;
  let row = n / width;
  let c = p.left + n % width;
  let position = f32(at[0] + row);
  if (row >= p.R || position < dial.first || position >= dial.last) { return; }
  var y = dial.keep * x[row * p.C + c];
  if (STATE) { y += dial.strength * state[c]; }
  x[row * p.C + c] = y;
}
