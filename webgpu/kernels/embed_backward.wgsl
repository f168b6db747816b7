// dE[id] += the sum of dx (R, C) over the rows whose token is id. WGSL has no atomic floats, so that the rows are gathered
// by lists.
//
// lists: [n, id_0 ... id_{n-1}, start_0 ... start_n, rows ...]: the number of ids; the ids; where the rows of each id begin,
// and where the last ones end; and the rows. room: the number of ids for which the lists have space. Without ACCUMULATE, dE
// of these ids becomes the sum. A thread computes a column of an id.

override ACCUMULATE: bool = true;

struct Params { C: u32, room: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> lists: array<u32>;
@group(0) @binding(2) var<storage, read> dx: array<f32>;
@group(0) @binding(3) var<storage, read_write> d_embed: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  let which = n / p.C;
  let column = n % p.C;
  if (which >= lists[0]) { return; }
  let starts = 1 + p.room;
  let rows = starts + p.room + 1;
  var sum = 0.0;
  for (var i = lists[starts + which]; i < lists[starts + which + 1]; i++) {
    sum += dx[lists[rows + i] * p.C + column];
  }
  let at = lists[1 + which] * p.C + column;
  if (ACCUMULATE) { sum += d_embed[at]; }
  d_embed[at] = sum;
}
