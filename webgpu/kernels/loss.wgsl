// Cross-entropy of logits (R, V) with targets (R,): losses[row] = log sum exp - the target's logit; and its gradient in
// place of the logits: scale (softmax - 1 at the target), unless JUDGE. A workgroup has a row.

override SIZE: u32 = 128;  // threads
override JUDGE: bool = false;

struct Params { R: u32, V: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> targets: array<u32>;
@group(0) @binding(2) var<storage, read_write> logits: array<f32>;
@group(0) @binding(3) var<storage, read_write> losses: array<f32>;

var<workgroup> parts: array<f32, SIZE>;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= p.R) { return; }
  let start = row * p.V;
  var top = -1e30;
  for (var i = thread; i < p.V; i += SIZE) { top = max(top, logits[start + i]); }
  parts[thread] = top;
  workgroupBarrier();
  for (var i = 0u; i < SIZE; i++) { top = max(top, parts[i]); }
  workgroupBarrier();
  var sum = 0.0;
  for (var i = thread; i < p.V; i += SIZE) { sum += exp(logits[start + i] - top); }
  parts[thread] = sum;
  workgroupBarrier();
  sum = 0.0;
  for (var i = 0u; i < SIZE; i++) { sum += parts[i]; }
  let target_at = targets[row];
  if (thread == 0) { losses[row] = log(sum) + top - logits[start + target_at]; }
  workgroupBarrier();
  if (!JUDGE) {
    for (var i = thread; i < p.V; i += SIZE) {
      var gradient = exp(logits[start + i] - top) / sum;
      if (i == target_at) { gradient -= 1; }
      logits[start + i] = gradient * p.scale;
    }
  }
}
