// The probabilities with which the next token is drawn under settings of sampling, as kernels/sample.wgsl draws it.

/** The logits of the token that comes after ids (T,): n_vocab numbers. */
export async function logitsAfter(model, ids) {
  model.checkPrompt(ids);
  const { n_embd: C } = model.config;
  const [found] = await model.once((plan) => {
    const last = plan.scratch(4 * C);
    plan.copy(model.read(plan, ids), 4 * C * (ids.length - 1), last, 0, 4 * C);
    return [[model.unembed(plan, last, 1), 4 * model.n_vocab]];
  });
  return new Float32Array(found);
}

/** What settings of sampling make of logits (n,): {p(id), drawn(id), cutBy(id), kept}.
 *
 *  p(id)      the model's probability of a token
 *  drawn(id)  the probability with which it is drawn: by logits / temperature, among the tokens that all filters keep
 *  cutBy(id)  the filter that cuts it off: temperature (of 0: the most probable token is always taken), top_k, top_p (the fewest
 *             tokens whose probabilities sum to top_p; Holtzman et al. 2020) or min_p (Nguyen et al. 2024); "" for a token that is kept
 *  kept       how many tokens are left after each of the filters, which act in this order: {top_k, top_p, min_p}; a filter that is
 *             turned off is left out */
export function chances(logits, { temperature, top_k, top_p, min_p }) {
  const best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b))), top = logits[best];
  const scaled = (logit) => (logit - top) / (temperature || 1);
  const sum = (values) => values.reduce((total, value) => total + Math.exp(value), 0);
  const whole = sum(Float64Array.from(logits, (logit) => logit - top)), p = (id) => Math.exp(logits[id] - top) / whole;
  if (temperature === 0) {
    return { p, drawn: (id) => Number(id === best), cutBy: (id) => id === best ? "" : "temperature", kept: {} };
  }
  const sorted = Float64Array.from(logits, scaled).sort().reverse(), kept = {}, least = {};
  const keep = (filter, threshold) => {  // tokens below the threshold are cut off
    const beyond = sorted.findIndex((value) => value < threshold);
    kept[filter] = Math.min(Object.values(kept).at(-1) ?? sorted.length, beyond < 0 ? sorted.length : beyond);
    least[filter] = threshold;
  };
  if (top_k > 0 && top_k < sorted.length) keep("top_k", sorted[top_k - 1]);
  if (top_p < 1) {
    const enough = top_p * sum(sorted.subarray(0, kept.top_k));
    let mass = 0;
    keep("top_p", sorted.find((value) => (mass += Math.exp(value)) >= enough) ?? -Infinity);
  }
  if (min_p > 0) keep("min_p", Math.log(min_p));
  const left = sum(sorted.subarray(0, Object.values(kept).at(-1)));
  const cutBy = (id) => Object.keys(least).find((filter) => scaled(logits[id]) < least[filter]) ?? "";
  return { p, drawn: (id) => cutBy(id) ? 0 : Math.exp(scaled(logits[id])) / left, cutBy, kept };
}
