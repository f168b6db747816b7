// x[b, to[b]] = donor[from[b]] for B sequences x (B, T, C) and the activations donor (S, C) of another sequence. places:
// from (B,), then to (B,). A thread copies a number.

struct Params { B: u32, T: u32, C: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> places: array<u32>;
@group(0) @binding(2) var<storage, read> donor: array<f32>;
@group(0) @binding(3) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  let b = n / p.C;
  let c = n % p.C;
  if (b < p.B) { x[(b * p.T + places[p.B + b]) * p.C + c] = donor[places[b] * p.C + c]; }
}
