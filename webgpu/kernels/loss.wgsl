// Cross-entropy of logits (R, V) with targets (R,): losses[row] = log sum exp(logits) - the target's logit; and, unless
// EVALUATE, the gradient scale (softmax - 1 at the target), which replaces the logits. With softcap > 0 the logits are first
// bounded as in softcap.wgsl: l = softcap tanh(logit / softcap), whose derivative is 1 - (l / softcap)^2.
//
// A workgroup computes a row.

override SIZE: u32 = 256;  // threads, a power of two
override EVALUATE: bool = false;

struct Params { R: u32, V: u32, scale: f32, softcap: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> targets: array<u32>;
@group(0) @binding(2) var<storage, read_write> logits: array<f32>;
@group(0) @binding(3) var<storage, read_write> losses: array<f32>;

var<workgroup> parts: array<f32, SIZE>;

fn logit_at(at: u32) -> f32 {
  if (p.softcap == 0) { return logits[at]; }
  let e = exp(-2 * abs(logits[at]) / p.softcap);
  return sign(logits[at]) * p.softcap * (1 - e) / (1 + e);
}

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= p.R) { return; }
  let start = row * p.V;
  var top = -1e30;
  for (var i = thread; i < p.V; i += SIZE) { top = max(top, logit_at(start + i)); }
  parts[thread] = top;
  for (var half = SIZE / 2; half > 0; half /= 2) {
    workgroupBarrier();
    if (thread < half) { parts[thread] = max(parts[thread], parts[thread + half]); }
  }
  workgroupBarrier();
  top = parts[0];
  workgroupBarrier();
  var sum = 0.0;
  for (var i = thread; i < p.V; i += SIZE) { sum += exp(logit_at(start + i) - top); }
  parts[thread] = sum;
  for (var half = SIZE / 2; half > 0; half /= 2) {
    workgroupBarrier();
    if (thread < half) { parts[thread] += parts[thread + half]; }
  }
  workgroupBarrier();
  sum = parts[0];
  let target_at = targets[row];
  if (thread == 0) { losses[row] = log(sum) + top - logit_at(start + target_at); }
  workgroupBarrier();
  if (!EVALUATE) {
    for (var i = thread; i < p.V; i += SIZE) {
      let logit = logit_at(start + i);
      var gradient = exp(logit - top) / sum;
      if (i == target_at) { gradient -= 1; }
      if (p.softcap > 0) { gradient *= 1 - (logit / p.softcap) * (logit / p.softcap); }
      logits[start + i] = gradient * p.scale;
    }
  }
}
