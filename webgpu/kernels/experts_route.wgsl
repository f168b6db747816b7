// The experts that each of R tokens uses, and their weights, from the router's logits (R, E): with p = softmax(logits), chosen
// (R, k) are the k experts of largest p + balance, the largest first, and gates (R, k) are p / (sum of the chosen p), or p where
// k = 1. BALANCE: balance (E,) is a bias that only chooses (Wang et al. 2024); without it, it is 0.
//
// A thread takes a token.

override BALANCE: bool = false;

struct Params { R: u32, E: u32, k: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read> balance: array<f32>;
@group(0) @binding(3) var<storage, read_write> chosen: array<u32>;
@group(0) @binding(4) var<storage, read_write> gates: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let row = (group.x + group.y * groups.x) * 64 + thread;
  if (row >= p.R) { return; }
  let first = row * p.E;
  var highest = logits[first];
  for (var e = 1u; e < p.E; e++) { highest = max(highest, logits[first + e]); }
  var total = 0.0;
  for (var e = 0u; e < p.E; e++) { total += exp(logits[first + e] - highest); }
  var last = 3e38;     // the score of the expert that was chosen last
  var last_e = 0u;
  var sum = 0.0;       // of the chosen p
  for (var i = 0u; i < p.k; i++) {
    var best = -3e38;  // the next one: the largest score below the last one's, or an equal one of a later expert
    var best_e = 0u;
    for (var e = 0u; e < p.E; e++) {
      var score = exp(logits[first + e] - highest) / total;
      if (BALANCE) { score += balance[e]; }
      let is_left = score < last || (score == last && e > last_e);
      if (is_left && score > best) {
        best = score;
        best_e = e;
      }
    }
    last = best;
    last_e = best_e;
    let share = exp(logits[first + best_e] - highest) / total;
    sum += share;
    chosen[row * p.k + i] = best_e;
    gates[row * p.k + i] = share;
  }
  if (p.k > 1) {
    for (var i = 0u; i < p.k; i++) { gates[row * p.k + i] /= sum; }
  }
}
