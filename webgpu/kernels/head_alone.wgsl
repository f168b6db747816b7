// y[t H + h] = x[t] in the columns of head h, 0 in all others: x (T, W), y (T H, W), with W / H columns for each head. So the
// output projection of y has in each row what one head alone adds to one position. A thread computes a number.

struct Params { T: u32, H: u32, W: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
  let n = (group.x + group.y * groups.x) * 64 + thread;
  let row = n / p.W;
  let column = n % p.W;
  if (row >= p.T * p.H) { return; }
  y[n] = select(0.0, x[row / p.H * p.W + column], column / (p.W / p.H) == row % p.H);
}
