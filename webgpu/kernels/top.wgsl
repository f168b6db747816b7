// The predictions of logits (R, V), of which the first n are tokens: for each row the five most probable tokens, their
// probabilities, the entropy in bits, and the log-probability of the row's target, in nats, among all V.
//
//   found[row] (16,) = id_1 ... id_5, p_1 ... p_5, entropy, log p(target), and four unused numbers
//
// A workgroup computes a row.

override SIZE: u32 = 256;  // threads, a power of two

struct Params { R: u32, V: u32, n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> targets: array<u32>;
@group(0) @binding(2) var<storage, read> logits: array<f32>;
@group(0) @binding(3) var<storage, read_write> found: array<f32>;

const LOWEST = -1e30;
var<workgroup> parts: array<vec4<f32>, SIZE>;

// The logits of a row at i, i + SIZE, i + 2 SIZE and i + 3 SIZE: four loads at a time hide their latency.
fn four(start: u32, i: u32) -> vec4<f32> {
  let ids = vec4(i) + SIZE * vec4(0u, 1, 2, 3);
  let at = start + min(ids, vec4(p.V - 1));
  return select(vec4(LOWEST), vec4(logits[at.x], logits[at.y], logits[at.z], logits[at.w]), ids < vec4(p.V));
}

// Whether a token (logit, id) comes before another one in the order of logits and then of ids.
fn before(a: vec2<f32>, b: vec2<f32>) -> bool { return a.x > b.x || (a.x == b.x && a.y < b.y); }

@compute @workgroup_size(SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= p.R) { return; }
  let start = row * p.V;
  var mine: array<vec2<f32>, 5>;              // this thread's most probable tokens (logit, id)
  for (var place = 0u; place < 5; place++) { mine[place] = vec2(LOWEST, 0.0); }
  var highest = LOWEST;                       // of all logits, also those of padding: ids from n on
  for (var i = thread; i < p.V; i += 4 * SIZE) {
    let next = four(start, i);
    highest = max(highest, max(max(next.x, next.y), max(next.z, next.w)));
    for (var c = 0u; c < 4; c++) {
      let id = i + c * SIZE;
      if (id < p.n && next[c] > mine[4].x) {
        var token = vec2(next[c], f32(id));
        for (var place = 0u; place < 5; place++) {
          if (before(token, mine[place])) {
            let other = mine[place];
            mine[place] = token;
            token = other;
          }
        }
      }
    }
  }
  var five: array<vec2<f32>, 5>;
  var next = 0u;                              // the place of this thread's first token that is not taken
  for (var place = 0u; place < 5; place++) {
    parts[thread] = vec4(LOWEST, 0.0, highest, 0.0);
    if (next < 5) { parts[thread] = vec4(mine[next], highest, 0.0); }
    for (var half = SIZE / 2; half > 0; half /= 2) {
      workgroupBarrier();
      if (thread < half) {
        let other = parts[thread + half];
        let best = select(parts[thread].xy, other.xy, before(other.xy, parts[thread].xy));
        parts[thread] = vec4(best, max(parts[thread].z, other.z), 0.0);
      }
    }
    workgroupBarrier();
    five[place] = parts[0].xy;
    highest = parts[0].z;
    workgroupBarrier();
    if (next < 5 && mine[next].x > LOWEST && mine[next].y == five[place].y) { next++; }
  }
  let top = five[0].x;
  var sums = vec4(0.0);                       // of exp over tokens, of exp times logit, of exp over all
  for (var i = thread; i < p.V; i += 4 * SIZE) {
    let all = four(start, i);
    sums.z += dot(exp(all - highest), vec4(1.0));
    let tokens = select(vec4(LOWEST), all - top, vec4(i) + SIZE * vec4(0u, 1, 2, 3) < vec4(p.n));
    sums += vec4(dot(exp(tokens), vec4(1.0)), dot(exp(tokens), max(tokens, vec4(-1e4))), 0.0, 0.0);
  }
  parts[thread] = sums;
  for (var half = SIZE / 2; half > 0; half /= 2) {
    workgroupBarrier();
    if (thread < half) { parts[thread] += parts[thread + half]; }
  }
  workgroupBarrier();
  if (thread == 0) {
    sums = parts[0];
    for (var place = 0u; place < 5; place++) {
      found[row * 16 + place] = five[place].y;
      found[row * 16 + 5 + place] = exp(five[place].x - top) / sums.x;
    }
    found[row * 16 + 10] = (log(sums.x) - sums.y / sums.x) / log(2.0);
    found[row * 16 + 11] = logits[start + targets[row]] - highest - log(sums.z);
  }
}
