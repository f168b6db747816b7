// Makes the attention weights of tokens that a routed block did not take 0, as queries and as keys: map (H, T, T), taken (T,).
// A thread takes a weight.

struct Params { H: u32, T: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> taken: array<u32>;
@group(0) @binding(2) var<storage, read_write> map: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n >= p.H * p.T * p.T) { return; }
  if (taken[n % p.T] == 0 || taken[n / p.T % p.T] == 0) { map[n] = 0; }
}
