// Draws the next token by logits (V,), of which the first n are tokens, as model.py's sample_token: temperature 0 takes the
// most probable token. Otherwise it keeps the top_k most probable tokens (0: all), of these the fewest whose probabilities
// sum to top_p, and of these all with at least min_p times the largest probability; the token with the largest sum of logit
// / temperature and Gumbel noise is drawn.
//
// The tokens that are kept are those with logits above a threshold: the largest one that keeps enough tokens. It is found
// bit by bit, after the bits of floats are mapped to integers of the same order. That takes 32 passes over the candidates.
// Where top_k is small, these are not all tokens. maxima (4 SIZE,) has the largest of every 4 SIZE-th logit and its token, see
// maxima.wgsl: thus each thread knows the largest of its tokens, which are every SIZE-th. No token below the top_k-th largest
// of these can be among the top_k, and only threads that know a larger one can have such tokens.
//
// at: position, count, steps, seed; it is updated for the next pass. The token is written to tokens[0], where the next pass
// reads it, and to the ring buffer `drawn`. There is one workgroup. Its shared memory is small, since SwiftShader, which runs
// kernels on a processor, compiles for a fifth of a millisecond for each word of it.

struct Params { n: u32, top_k: u32, temperature: f32, top_p: f32, min_p: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read> maxima: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> at: array<u32>;
@group(0) @binding(4) var<storage, read_write> tokens: array<u32>;
@group(0) @binding(5) var<storage, read_write> drawn: array<u32>;

const SIZE = 256u;         // threads
const SIDE = 16u;          // its root
const LOWEST = -1e30;
var<workgroup> parts: array<vec2<f32>, SIZE>;
var<workgroup> lines: array<vec2<f32>, SIDE>;
var<workgroup> bound: f32;
var<workgroup> chosen: array<u32, SIZE>;

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
  if (thread < SIDE) {
    for (var i = 0u; i < SIDE; i++) { sum += parts[thread * SIDE + i].x; }
    lines[thread].x = sum;
  }
  workgroupBarrier();
  sum = 0.0;
  for (var i = 0u; i < SIDE; i++) { sum += lines[i].x; }
  return sum;
}

// Of two pairs that with the larger first number; if these are equal, that with the lower second number, the token.
fn larger(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
  return select(a, b, b.x > a.x || (b.x == a.x && b.y < a.y));
}

fn largest(value: vec2<f32>, thread: u32) -> vec2<f32> {
  workgroupBarrier();
  parts[thread] = value;
  workgroupBarrier();
  var best = parts[thread % SIDE * SIDE];
  for (var i = 1u; i < SIDE; i++) { best = larger(best, parts[thread % SIDE * SIDE + i]); }
  if (thread < SIDE) { lines[thread] = best; }
  workgroupBarrier();
  for (var i = 0u; i < SIDE; i++) { best = larger(best, lines[i]); }
  return best;
}

// The i-th of the tokens of `count` chosen threads; p.n or more beyond their end.
fn token_of(i: u32, count: u32) -> u32 { return chosen[i % count] + i / count * SIZE; }

// The number of candidates, if they are listed in parts: pairs of a logit and its token. 0: there are too many of them, and all
// tokens are candidates. parts has the threads' largest logits, of which own is this thread's.
fn candidates(own: f32, thread: u32) -> u32 {
  if (p.top_k == 0 || p.top_k >= p.n || p.top_k > SIZE) { return 0; }
  var above = 0u;
  for (var i = 0u; i < SIZE; i++) {
    if (parts[i].x > own || (parts[i].x == own && i < thread)) { above++; }
  }
  if (above == p.top_k - 1) { bound = own; }
  workgroupBarrier();
  var place = 0u;
  var count = 0u;
  for (var i = 0u; i < SIZE; i++) {
    if (i == thread) { place = count; }
    if (parts[i].x >= bound) { count++; }
  }
  if (own >= bound) { chosen[place] = thread; }
  workgroupBarrier();
  let end = count * ((p.n + SIZE - 1) / SIZE);
  count = max(count, 1);
  var mine = 0u;
  for (var i = thread; i < end; i += SIZE) {
    let token = token_of(i, count);
    if (token < p.n && logits[min(token, p.n - 1)] >= bound) { mine++; }
  }
  workgroupBarrier();
  parts[thread].x = f32(mine);
  workgroupBarrier();
  var all = 0u;
  for (var i = 0u; i < SIZE; i++) {
    if (i == thread) { place = all; }
    all += u32(parts[i].x);
  }
  let fits = all <= SIZE;
  workgroupBarrier();
  for (var i = thread; i < end; i += SIZE) {
    let token = token_of(i, count);
    let value = logits[min(token, p.n - 1)];
    if (fits && token < p.n && value >= bound) {
      parts[place] = vec2(value, f32(token));
      place++;
    }
  }
  workgroupBarrier();
  return select(0u, all, fits);
}

@compute @workgroup_size(SIZE)
fn main(@builtin(local_invocation_index) thread: u32) {
  var best = maxima[thread];
  for (var i = 1u; i < 4; i++) { best = larger(best, maxima[i * SIZE + thread]); }
  let own = best.x;
  best = largest(best, thread);
  let top = best.x;
  if (p.temperature > 0) {
    let listed = candidates(own, thread);
    let n = select(p.n, listed, listed > 0);
    let mine = parts[thread];  // of a list
    var threshold = 0u;
    // First top_k, which counts the candidates, then top_p, which sums their probabilities.
    for (var stage = 0u; stage < 2; stage++) {
      if (select(p.top_p >= 1, p.top_k == 0 || p.top_k >= p.n, stage == 0)) { continue; }
      let kept = threshold;
      var enough = f32(p.top_k);
      threshold = 0;
      for (var step = 0u; step < 33; step++) {  // in the first one without a bit, for the sum of all
        let next = threshold | select(0x80000000u >> (step - 1), 0u, step == 0);
        var sum = 0.0;
        for (var i = thread; i < n; i += SIZE) {
          let value = select(logits[i], mine.x, listed > 0);
          if (sorted_bits(value) >= max(kept, next)) { sum += select(exp((value - top) / p.temperature), 1.0, stage == 0); }
        }
        sum = total(sum, thread);
        if (step == 0 && stage == 1) { enough = p.top_p * sum; }
        if (sum >= enough) { threshold = next; }
      }
      threshold = min(max(threshold, kept), sorted_bits(top));
    }
    var floor = LOWEST;
    if (p.min_p > 0) { floor = top + log(p.min_p) * p.temperature; }
    best = vec2(LOWEST, 0.0);
    for (var i = thread; i < n; i += SIZE) {
      let value = select(logits[i], mine.x, listed > 0);
      if (sorted_bits(value) >= threshold && value >= floor) {
        let token = select(i, u32(mine.y), listed > 0);
        best = larger(best, vec2((value - top) / p.temperature + noise(token, at[2], at[3]), f32(token)));
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
