// v = v + 2 sigmoid(gate) found: values v (R, KV, D) and embeddings of the tokens, found (R, KV, D), with a gate for each head
// (R, KV). A thread computes a number.

struct Params { R: u32, KV: u32, D: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gate: array<f32>;
@group(0) @binding(2) var<storage, read> found: array<f32>;
@group(0) @binding(3) var<storage, read_write> v: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n < p.R * p.KV * p.D) { v[n] += 2 / (1 + exp(-gate[n / p.D])) * found[n]; }
}
