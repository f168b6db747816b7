// act(x) of four numbers, for the kernels that begin with this file. KIND:
//   0 relu2       max(x, 0)^2                              2 gelu_tanh   x sigmoid(sqrt(8 / pi) (x + 0.044715 x^3))
//   1 gelu        x (1 + erf(x / sqrt 2)) / 2              3 swiglu      gate sigmoid(gate) x
//                                                          4 geglu       gelu_tanh(gate) x
//   5 swiglu_clip  g sigmoid(1.702 g) (x' + 1), with g = min(gate, 7) and x' = x within -7 and 7 (GPT-OSS)
// 0, 1 and 2 do not use gate.

override KIND: u32 = 0;

fn sigmoid(x: vec4<f32>) -> vec4<f32> { return 1 / (1 + exp(-x)); }

fn gelu_tanh(x: vec4<f32>) -> vec4<f32> { return x * sigmoid(1.59576912 * (x + 0.044715 * x * x * x)); }

fn erf(x: vec4<f32>) -> vec4<f32> {  // within 5e-7 (Abramowitz & Stegun 1964, 7.1.26)
  let size = abs(x);
  let t = 1 / (1 + 0.3275911 * size);
  let sum = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return sign(x) * (1 - sum * exp(-size * size));
}

fn act(gate: vec4<f32>, x: vec4<f32>) -> vec4<f32> {
  switch (KIND) {
    case 0: { return max(x, vec4(0.0)) * max(x, vec4(0.0)); }
    case 1: { return x * (0.5 + 0.5 * erf(x * 0.70710678)); }
    case 2: { return gelu_tanh(x); }
    case 4: { return gelu_tanh(gate) * x; }
    case 5: {
      let g = min(gate, vec4(7.0));
      return g * sigmoid(1.702 * g) * (clamp(x, vec4(-7.0), vec4(7.0)) + 1);
    }
    default: { return gate * sigmoid(gate) * x; }
  }
}
