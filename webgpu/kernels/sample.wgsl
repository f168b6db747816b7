// Draws the next token by logits (V,), of which the first n are tokens, as model.py's sample_token: temperature 0 takes the
// most probable token. Otherwise it keeps the top_k most probable tokens (0: all), of these the fewest whose probabilities
// sum to top_p, and of these all with at least min_p times the largest probability; the token with the largest sum of logit
// / temperature and Gumbel noise is drawn.
//
// The tokens that are kept are those with logits above a threshold: the largest one that keeps enough tokens. It is found
// bit by bit, after the bits of floats are mapped to integers of the same order. That takes 32 passes over the candidates.
// Where top_k is small, these are not all tokens: each thread's own largest logit is known after the first pass, and no
// token below the top_k-th of these can be among the top_k.
//
// at: position, count, steps, seed; it is updated for the next pass. The token is written to tokens[0], where the next pass
// reads it, and to the ring buffer `drawn`. There is one workgroup.

struct Params { n: u32, top_k: u32, temperature: f32, top_p: f32, min_p: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read_write> at: array<u32>;
@group(0) @binding(3) var<storage, read_write> tokens: array<u32>;
@group(0) @binding(4) var<storage, read_write> drawn: array<u32>;

override SIZE: u32 = 256;  // threads, a power of two
const ROOM = 1024u;        // for candidates, if they are not all tokens
const LOWEST = -1e30;
var<workgroup> parts: array<vec2<f32>, SIZE>;
var<workgroup> bound: f32;
var<workgroup> ids: array<u32, ROOM>;
var<workgroup> values: array<f32, ROOM>;

// The logits of the tokens i, i + SIZE, i + 2 SIZE and i + 3 SIZE: four loads at a time hide their latency.
fn four(i: u32) -> vec4<f32> {
  let at = vec4(i) + SIZE * vec4(0u, 1, 2, 3);
  let inside = min(at, vec4(p.n - 1));
  return select(vec4(LOWEST), vec4(logits[inside.x], logits[inside.y], logits[inside.z], logits[inside.w]), at < vec4(p.n));
}

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

// The logit of a candidate, see candidates().
fn value_at(i: u32, listed: u32) -> f32 {
  if (listed > 0) { return values[i]; }
  return logits[i];
}

fn total(value: f32, thread: u32) -> f32 {
  workgroupBarrier();
  parts[thread].x = value;
  for (var half = SIZE / 2; half > 0; half /= 2) {
    workgroupBarrier();
    if (thread < half) { parts[thread].x += parts[thread + half].x; }
  }
  workgroupBarrier();
  return parts[0].x;
}

// The pair with the largest first number; among equal ones that with the lowest second number, the token.
fn largest(value: vec2<f32>, thread: u32) -> vec2<f32> {
  workgroupBarrier();
  parts[thread] = value;
  for (var half = SIZE / 2; half > 0; half /= 2) {
    workgroupBarrier();
    if (thread < half) {
      let other = parts[thread + half];
      if (other.x > parts[thread].x || (other.x == parts[thread].x && other.y < parts[thread].y)) { parts[thread] = other; }
    }
  }
  workgroupBarrier();
  return parts[0];
}

// The number of candidates, of which `values` and `ids` are a list; 0: all tokens are candidates. own: the largest logit of
// this thread's tokens.
fn candidates(own: f32, thread: u32) -> u32 {
  if (p.top_k == 0 || p.top_k >= p.n || p.top_k > SIZE) { return 0; }
  workgroupBarrier();
  parts[thread].x = own;
  workgroupBarrier();
  var above = 0u;
  for (var i = 0u; i < SIZE; i++) {
    if (parts[i].x > own || (parts[i].x == own && i < thread)) { above++; }
  }
  if (above == p.top_k - 1) { bound = own; }
  workgroupBarrier();
  var count = 0u;
  for (var i = thread; i < p.n; i += 4 * SIZE) {
    let at_least = four(i) >= vec4(bound);
    count += dot(select(vec4(0u), vec4(1u), at_least), vec4(1u));
  }
  parts[thread].x = f32(count);
  workgroupBarrier();
  var place = 0u;
  var all = 0u;
  for (var i = 0u; i < SIZE; i++) {
    if (i == thread) { place = all; }
    all += u32(parts[i].x);
  }
  let fits = all <= ROOM;
  for (var i = thread; i < p.n; i += 4 * SIZE) {
    let next = four(i);
    for (var c = 0u; c < 4; c++) {
      if (fits && i + c * SIZE < p.n && next[c] >= bound) {
        values[place] = next[c];
        ids[place] = i + c * SIZE;
        place++;
      }
    }
  }
  workgroupBarrier();
  return select(0u, all, fits);
}

@compute @workgroup_size(SIZE)
fn main(@builtin(local_invocation_index) thread: u32) {
  var best = vec2(LOWEST, 0.0);
  for (var i = thread; i < p.n; i += 4 * SIZE) {
    let next = four(i);
    for (var c = 0u; c < 4; c++) {
      if (next[c] > best.x) { best = vec2(next[c], f32(i + c * SIZE)); }
    }
  }
  let own = best.x;
  best = largest(best, thread);
  let top = best.x;
  if (p.temperature > 0) {
    let listed = candidates(own, thread);
    let n = select(p.n, listed, listed > 0);
    var threshold = 0u;
    if (p.top_k > 0 && p.top_k < p.n) {
      for (var bit = 0x80000000u; bit > 0; bit >>= 1) {
        var count = 0.0;
        for (var i = thread; i < n; i += SIZE) {
          if (sorted_bits(value_at(i, listed)) >= (threshold | bit)) { count += 1; }
        }
        if (total(count, thread) >= f32(p.top_k)) { threshold |= bit; }
      }
    }
    if (p.top_p < 1) {
      let kept = threshold;
      var all = 0.0;
      for (var i = thread; i < n; i += SIZE) {
        let value = value_at(i, listed);
        if (sorted_bits(value) >= kept) { all += exp((value - top) / p.temperature); }
      }
      all = total(all, thread);
      threshold = 0;
      for (var bit = 0x80000000u; bit > 0; bit >>= 1) {
        var mass = 0.0;
        for (var i = thread; i < n; i += SIZE) {
          let value = value_at(i, listed);
          if (sorted_bits(value) >= max(kept, threshold | bit)) { mass += exp((value - top) / p.temperature); }
        }
        if (total(mass, thread) >= p.top_p * all) { threshold |= bit; }
      }
      threshold = min(max(threshold, kept), sorted_bits(top));
    }
    var floor = LOWEST;
    if (p.min_p > 0) { floor = top + log(p.min_p) * p.temperature; }
    best = vec2(LOWEST, 0.0);
    for (var i = thread; i < n; i += SIZE) {
      let value = value_at(i, listed);
      if (sorted_bits(value) >= threshold && value >= floor) {
        var token = i;
        if (listed > 0) { token = ids[i]; }
        let noisy = (value - top) / p.temperature + noise(token, at[2], at[3]);
        if (noisy > best.x) { best = vec2(noisy, f32(token)); }
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
