// A logit of each head, sink (H,), joins the softmax of each query: lse (R, H) becomes log(exp(lse) + exp(sink)), and the outputs
// o (R, H, D) of attention.wgsl shrink by exp(old lse - new lse), since the logit has no value. A thread takes a query of a head.

struct Params { R: u32, H: u32, D: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sink: array<f32>;
@group(0) @binding(2) var<storage, read_write> o: array<f32>;
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n >= p.R * p.H) { return; }
  let old = lse[n];
  let top = max(old, sink[n % p.H]);
  let new_lse = top + log(exp(old - top) + exp(sink[n % p.H] - top));
  for (var c = n * p.D; c < n * p.D + p.D; c++) { o[c] *= exp(old - new_lse); }
  lse[n] = new_lse;
}
