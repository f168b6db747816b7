// y = entered + gate (stream + y - entered): the stream after a routed block, from its input, `entered` (R, C), and what it would
// be after a plain block, stream + y; gate (R,). Where gate is 0, it is the input, bit for bit. A thread computes a number.

struct Params { R: u32, C: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> entered: array<f32>;
@group(0) @binding(2) var<storage, read> gate: array<f32>;
@group(0) @binding(3) var<storage, read> stream: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n >= p.R * p.C) { return; }
  let factor = gate[n / p.C];
  var value = entered[n];
  if (factor != 0) { value += factor * (stream[n] + y[n] - value); }
  y[n] = value;
}
