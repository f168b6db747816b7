// For sinks.wgsl and sinks_map.wgsl, before which gpu.js puts this file; p and the arrays are theirs.
//
// The score of a query at a position and a sink, the key of position j: that of a query at min(position, S + W - 1). q has been
// turned by its position, and is turned back by what is too much. row: of q, in its head; key: row of k, in its head.
fn score_of(row: u32, head: u32, position: u32, key: u32, j: u32) -> f32 {
  let nearest = min(position, p.sinks + p.window - 1);
  let half = p.rotary / 2;
  let q_at = row * p.D;
  let k_at = key * p.D;
  var product = 0.0;
  for (var c = 0u; c < half; c++) {
    let turn = turns[(position - nearest) * half + c];
    let a = q[q_at + c] * turn.x + q[q_at + c + half] * turn.y;
    let b = q[q_at + c + half] * turn.x - q[q_at + c] * turn.y;
    product += a * k[k_at + c] + b * k[k_at + c + half];
  }
  for (var c = 2 * half; c < p.D; c++) { product += q[q_at + c] * k[k_at + c]; }
  var score = product * p.scale;
  if (p.softcap > 0) {
    let e = exp(-2 * abs(score) / p.softcap);
    score = sign(score) * p.softcap * (1 - e) / (1 + e);
  }
  return score - slopes[head] * f32(nearest - j);
}
