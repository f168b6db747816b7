// The gradients of activation.wgsl's x and gate, from the gradient of its y. dx holds dy at first, and the gradient of x in
// the end.

override KIND: u32 = 0;

struct Params { n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gate: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;     // at first dy
@group(0) @binding(4) var<storage, read_write> d_gate: array<f32>;

fn sigmoid(x: f32) -> f32 { return 1 / (1 + exp(-x)); }

// gelu_tanh(x) and its derivative
fn gelu_tanh(x: f32) -> vec2<f32> {
  let s = sigmoid(1.59576912 * (x + 0.044715 * x * x * x));
  return vec2(x * s, s + x * s * (1 - s) * 1.59576912 * (1 + 3 * 0.044715 * x * x));
}

fn erf(x: f32) -> f32 {
  let size = abs(x);
  let t = 1 / (1 + 0.3275911 * size);
  let sum = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return sign(x) * (1 - sum * exp(-size * size));
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  if (n >= p.n) { return; }
  let v = x[n];
  let dy = dx[n];
  switch (KIND) {
    case 0: { dx[n] = dy * 2 * max(v, 0); }
    case 1: { dx[n] = dy * (0.5 + 0.5 * erf(v * 0.70710678) + v * 0.39894228 * exp(-0.5 * v * v)); }
    case 2: { dx[n] = dy * gelu_tanh(v).y; }
    case 4: {
      let g = gelu_tanh(gate[n]);
      d_gate[n] = dy * v * g.y;
      dx[n] = dy * g.x;
    }
    case 5: {
      let g = min(gate[n], 7);
      let s = sigmoid(1.702 * g);
      d_gate[n] = select(0.0, dy * (clamp(v, -7, 7) + 1) * s * (1 + 1.702 * g * (1 - s)), gate[n] < 7);
      dx[n] = select(0.0, dy * g * s, abs(v) < 7);
    }
    default: {
      let g = gate[n];
      let s = sigmoid(g);
      d_gate[n] = dy * v * s * (1 + g * (1 - s));
      dx[n] = dy * g * s;
    }
  }
}
