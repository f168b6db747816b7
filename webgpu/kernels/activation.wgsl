// y = act(x), number by number. KIND:
//   0 relu2       max(x, 0)^2                              2 gelu_tanh   x sigmoid(sqrt(8 / pi) (x + 0.044715 x^3))
//   1 gelu        x (1 + erf(x / sqrt 2)) / 2              3 swiglu      gate sigmoid(gate) x
//                                                          4 geglu       gelu_tanh(gate) x
//   5 swiglu_clip  g sigmoid(1.702 g) (x' + 1), with g = min(gate, 7) and x' = x within -7 and 7 (GPT-OSS)
// 0, 1 and 2 do not read gate: for them it may be any buffer.

override KIND: u32 = 0;

struct Params { n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gate: array<f32>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

fn sigmoid(x: f32) -> f32 { return 1 / (1 + exp(-x)); }

fn gelu_tanh(x: f32) -> f32 { return x * sigmoid(1.59576912 * (x + 0.044715 * x * x * x)); }

fn erf(x: f32) -> f32 {  // within 5e-7 (Abramowitz & Stegun 1964, 7.1.26)
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
  switch (KIND) {
    case 0: { y[n] = max(v, 0) * max(v, 0); }
    case 1: { y[n] = v * (0.5 + 0.5 * erf(v * 0.70710678)); }
    case 2: { y[n] = gelu_tanh(v); }
    case 4: { y[n] = gelu_tanh(gate[n]) * v; }
    case 5: {
      let g = min(gate[n], 7);
      y[n] = g * sigmoid(1.702 * g) * (clamp(v, -7, 7) + 1);
    }
    default: { y[n] = gate[n] * sigmoid(gate[n]) * v; }
  }
}
