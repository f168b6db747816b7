// Draws the next token by logits (V,), of which the first n are tokens, as model.py's sample_token: temperature 0 takes the
// most probable token. Otherwise it keeps the top_k most probable tokens (0: all), of these the fewest whose probabilities
// sum to top_p, and of these all with at least min_p times the largest probability; the token with the largest sum of logit
// / temperature and Gumbel noise is drawn.
//
// The tokens that are kept are those with logits above a threshold: the largest one that keeps enough tokens. It is found
// bit by bit, after the bits of floats are mapped to integers of the same order.
//
// at: position, count, steps, seed; it is updated for the next pass. The token is written to tokens[0], where the next pass
// reads it, and to the ring buffer `drawn`. There is one workgroup.

struct Params { n: u32, top_k: u32, temperature: f32, top_p: f32, min_p: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read_write> at: array<u32>;
@group(0) @binding(3) var<storage, read_write> tokens: array<u32>;
@group(0) @binding(4) var<storage, read_write> drawn: array<u32>;

override SIZE: u32 = 128;  // threads
var<workgroup> parts: array<vec2<f32>, SIZE>;

fn sorted_bits(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  return select(bits | 0x80000000, ~bits, (bits >> 31) == 1);
}

// Gumbel noise -log(-log(1 - u)), with u from the hash PCG (Jarzynski & Olano 2020). The smallest u decide the draw, so that
// the inner logarithm is a series for small u: there WGSL's log may have an error of 2^-21, and may even be 0.
fn noise(token: u32, step: u32, seed: u32) -> f32 {
  var state = (token * 747796405 + step * 2891336453 + seed * 277803737) ^ 0x9e3779b9;
  for (var i = 0u; i < 2; i++) {
    state = state * 747796405 + 2891336453;
    state = ((state >> ((state >> 28) + 4)) ^ state) * 277803737;
    state = (state >> 22) ^ state;
  }
  let u = (f32(state >> 9) + 0.5) / 8388608;
  return -log(select(-log(1 - u), u * (1 + u * (0.5 + u / 3)), u < 0.01));
}

fn total(value: f32, thread: u32) -> f32 {
  workgroupBarrier();
  parts[thread].x = value;
  workgroupBarrier();
  var sum = 0.0;
  for (var i = 0u; i < SIZE; i++) { sum += parts[i].x; }
  return sum;
}

// The pair with the largest first number; among equal ones that with the lowest second number, the token.
fn largest(value: vec2<f32>, thread: u32) -> vec2<f32> {
  workgroupBarrier();
  parts[thread] = value;
  workgroupBarrier();
  var best = parts[0];
  for (var i = 1u; i < SIZE; i++) {
    if (parts[i].x > best.x || (parts[i].x == best.x && parts[i].y < best.y)) { best = parts[i]; }
  }
  return best;
}

@compute @workgroup_size(SIZE)
fn main(@builtin(local_invocation_index) thread: u32) {
  var best = vec2(-1e30, 0.0);
  for (var i = thread; i < p.n; i += SIZE) {
    if (logits[i] > best.x) { best = vec2(logits[i], f32(i)); }
  }
  best = largest(best, thread);
  let top = best.x;
  if (p.temperature > 0) {
    var threshold = 0u;
    if (p.top_k > 0 && p.top_k < p.n) {
      for (var bit = 0x80000000u; bit > 0; bit >>= 1) {
        var count = 0.0;
        for (var i = thread; i < p.n; i += SIZE) {
          if (sorted_bits(logits[i]) >= (threshold | bit)) { count += 1; }
        }
        if (total(count, thread) >= f32(p.top_k)) { threshold |= bit; }
      }
    }
    if (p.top_p < 1) {
      let kept = threshold;
      var all = 0.0;
      for (var i = thread; i < p.n; i += SIZE) {
        if (sorted_bits(logits[i]) >= kept) { all += exp((logits[i] - top) / p.temperature); }
      }
      all = total(all, thread);
      threshold = 0;
      for (var bit = 0x80000000u; bit > 0; bit >>= 1) {
        var mass = 0.0;
        for (var i = thread; i < p.n; i += SIZE) {
          if (sorted_bits(logits[i]) >= max(kept, threshold | bit)) { mass += exp((logits[i] - top) / p.temperature); }
        }
        if (total(mass, thread) >= p.top_p * all) { threshold |= bit; }
      }
      threshold = min(max(threshold, kept), sorted_bits(top));
    }
    var floor = -1e30;
    if (p.min_p > 0) { floor = top + log(p.min_p) * p.temperature; }
    best = vec2(-1e30, 0.0);
    for (var i = thread; i < p.n; i += SIZE) {
      if (sorted_bits(logits[i]) >= threshold && logits[i] >= floor) {
        let value = (logits[i] - top) / p.temperature + noise(i, at[2], at[3]);
        if (value > best.x) { best = vec2(value, f32(i)); }
      }
    }
    best = largest(best, thread);
  }
  workgroupBarrier();
  if (thread == 0) {
    tokens[0] = u32(best.y);
    drawn[at[2] % arrayLength(&drawn)] = u32(best.y);
    at[0] += at[1];
    at[1] = 1;
    at[2] += 1;
  }
}
