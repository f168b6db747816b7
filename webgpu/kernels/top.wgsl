// The predictions of logits (R, V), of which the first n are tokens: for each row the five most probable tokens, their
// probabilities, the entropy in bits, and the log-probability of the row's target, in nats, among all V.
//
//   found[row] (16,) = id_1 ... id_5, p_1 ... p_5, entropy, log p(target), and four unused numbers
//
// A workgroup computes a row.

override SIZE: u32 = 64;  // threads

struct Params { R: u32, V: u32, n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> targets: array<u32>;
@group(0) @binding(2) var<storage, read> logits: array<f32>;
@group(0) @binding(3) var<storage, read_write> found: array<f32>;

var<workgroup> parts: array<vec4<f32>, SIZE>;
var<workgroup> tops: array<vec2<f32>, SIZE>;    // logit, id
var<workgroup> chosen: vec2<f32>;

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= p.R) { return; }
  let start = row * p.V;
  var top = vec4(-1e30);                      // of tokens, of all
  for (var i = thread; i < p.V; i += SIZE) {
    top.y = max(top.y, logits[start + i]);
    if (i < p.n) { top.x = top.y; }           // ids from n on are padding
  }
  parts[thread] = top;
  workgroupBarrier();
  for (var i = 0u; i < SIZE; i++) { top = max(top, parts[i]); }
  workgroupBarrier();
  var sums = vec4(0.0);                       // of exp over tokens, of exp times logit, of exp over all
  for (var i = thread; i < p.V; i += SIZE) {
    sums.z += exp(logits[start + i] - top.y);
    if (i < p.n) {
      let logit = logits[start + i] - top.x;
      sums += vec4(exp(logit), exp(logit) * logit, 0, 0);
    }
  }
  parts[thread] = sums;
  workgroupBarrier();
  sums = vec4(0.0);
  for (var i = 0u; i < SIZE; i++) { sums += parts[i]; }
  if (thread == 0) {
    found[row * 16 + 10] = (log(sums.x) - sums.y / sums.x) / log(2.0);
    found[row * 16 + 11] = logits[start + targets[row]] - top.y - log(sums.z);
  }
  var last = vec2(1e30, -1.0);                // the previous token, in the order of logits and then of ids
  for (var place = 0u; place < 5; place++) {
    var best = vec2(-1e30, 0.0);
    for (var i = thread; i < p.n; i += SIZE) {
      let logit = logits[start + i];
      let after = logit < last.x || (logit == last.x && f32(i) > last.y);
      if (after && logit > best.x) { best = vec2(logit, f32(i)); }
    }
    tops[thread] = best;
    workgroupBarrier();
    if (thread == 0) {
      for (var i = 1u; i < SIZE; i++) {
        if (tops[i].x > best.x || (tops[i].x == best.x && tops[i].y < best.y)) { best = tops[i]; }
      }
      chosen = best;
      found[row * 16 + place] = best.y;
      found[row * 16 + 5 + place] = exp(best.x - top.x) / sums.x;
    }
    workgroupBarrier();
    last = chosen;
    workgroupBarrier();
  }
}
