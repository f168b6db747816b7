// KL(P || Q) = sum P (log P - log Q), in nats, of the distributions P = softmax(a) and Q = softmax(b) of the first n of
// logits a and b: found (1,). There is one workgroup.

override SIZE: u32 = 256;  // threads, a power of two

struct Params { n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> found: array<f32>;

var<workgroup> parts: array<vec3<f32>, SIZE>;

@compute @workgroup_size(SIZE)
fn main(@builtin(local_invocation_index) thread: u32) {
  var highest = vec3(-1e30);
  for (var i = thread; i < p.n; i += SIZE) { highest = max(highest, vec3(a[i], b[i], -1e30)); }
  parts[thread] = highest;
  for (var half = SIZE / 2; half > 0; half /= 2) {
    workgroupBarrier();
    if (thread < half) { parts[thread] = max(parts[thread], parts[thread + half]); }
  }
  workgroupBarrier();
  highest = parts[0];
  workgroupBarrier();
  var sums = vec3(0.0);  // of exp a, of exp b, of (a - b) exp a
  for (var i = thread; i < p.n; i += SIZE) {
    let low = vec2(a[i], b[i]) - highest.xy;
    sums += vec3(exp(low), (low.x - low.y) * exp(low.x));
  }
  parts[thread] = sums;
  for (var half = SIZE / 2; half > 0; half /= 2) {
    workgroupBarrier();
    if (thread < half) { parts[thread] += parts[thread + half]; }
  }
  workgroupBarrier();
  if (thread == 0) {
    sums = parts[0];
    found[0] = max(0.0, sums.z / sums.x + log(sums.y / sums.x));
  }
}
