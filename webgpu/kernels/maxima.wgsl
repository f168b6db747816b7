// The largest of every N-th logit, and its token: maxima[t] = (logits[i], i) for the i = t, t + N, t + 2 N, ... below n, where N is
// the number of threads. Of equal ones it is the first; where there is none, -1e30. sample.wgsl goes on from there: it runs in one
// workgroup, for which all logits of a large vocabulary are many.

struct Params { n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read_write> maxima: array<vec2<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let step = 64 * groups.x;
  var best = vec2(-1e30, 0.0);
  for (var i = id.x; i < p.n; i += 4 * step) {
    let at = vec4(i) + step * vec4(0u, 1, 2, 3);  // four loads at a time hide their latency
    let inside = min(at, vec4(p.n - 1));
    let next = vec4(logits[inside.x], logits[inside.y], logits[inside.z], logits[inside.w]);
    for (var c = 0u; c < 4; c++) {
      if (at[c] < p.n && next[c] > best.x) { best = vec2(next[c], f32(at[c])); }
    }
  }
  maxima[id.x] = best;
}
