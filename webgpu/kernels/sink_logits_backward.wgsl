// What each query of a head gives to the gradient of the head's sink logit, whose weight is w = exp(sink - lse):
//
//   d_sink = -w delta,   since its value is 0; delta: see attention_backward_q.wgsl
//
// sink (H,); lse_delta: lse (R, H), then delta (R, H); each (R, H). A thread takes a query of a head.

struct Params { R: u32, H: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sink: array<f32>;
@group(0) @binding(2) var<storage, read> lse_delta: array<f32>;
@group(0) @binding(3) var<storage, read_write> each: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n < p.R * p.H) { each[n] = -exp(sink[n % p.H] - lse_delta[n]) * lse_delta[p.R * p.H + n]; }
}
