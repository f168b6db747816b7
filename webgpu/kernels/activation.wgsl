// (+ act.wgsl)
// y = act(x), number by number (see act.wgsl). If KIND has no gate, that may be any buffer. A thread computes four numbers.

struct Params { n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gate: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let i = (group.x + group.y * groups.x) * 64 + thread;
  if (4 * i >= p.n) { return; }
  let value = act(gate[i], x[i]);
  if (4 * i + 4 <= p.n) {
    y[i] = value;
  } else {
    y[i] = select(y[i], value, vec4(4 * i) + vec4(0u, 1, 2, 3) < vec4(p.n));
  }
}
