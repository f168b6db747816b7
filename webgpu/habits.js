// What a head attends to: for each habit, the share of the head's weights and the share by chance. docs/inside.md has the
// formulas; habits.py computes the same numbers.

/** Each habit, and what a head that has it does. */
export const HABITS = {
  start: "attends to the start of the text", itself: "attends to the token itself", previous: "attends to the previous token",
  induction: "attends to the token after an earlier copy of the current one (induction)",
  "same token": "attends to earlier copies of the current token",
};

/** For each habit the rows of a T x T map where it is possible: [{i, keys, chance}]. keys: those that row i can see and that
 *  belong to the habit; chance: what they would get of even weights. window: how many keys a row sees at most; 0: all that
 *  came before. weights (T, T): of a head of the layer; a token whose own weight is 0 was skipped by Mixture of Depths, and no
 *  row sees it. always: so many first keys each row sees too. */
export function rowsOf(ids, window = 0, weights = null, always = 0) {
  const works = (i) => !weights || weights[i * ids.length + i] > 0;
  const found = Object.fromEntries(Object.keys(HABITS).map((name) => [name, []]));
  for (let i = 1; i < ids.length; i++) {
    const first = window ? Math.max(0, i - window + 1) : 0;
    const seen = Array.from({ length: i + 1 }, (_, k) => k).filter((k) => (k >= first || k < always) && works(k)), visible = seen.length;
    if (visible < 2 || !works(i)) continue;  // a row with one key says nothing about the head
    const earlier = seen.filter((k) => k > 0 && k < i);
    const keys = { start: seen.filter((k) => k === 0), itself: [i], previous: earlier.filter((k) => k === i - 1),  // not key 0, the start
      induction: earlier.filter((k) => ids[k - 1] === ids[i]), "same token": earlier.filter((k) => ids[k] === ids[i]) };
    for (const [name, those] of Object.entries(keys)) {
      if (those.length) found[name].push({ i, keys: those, chance: those.length / visible });
    }
  }
  return found;
}

/** For each habit {share, chance, rows}: the mean over its rows, from rowsOf(), of its share of a head's weights (T, T), the
 *  share by chance, and how many rows there are. Without rows, both shares are NaN. */
export function habits(weights, T, rows) {
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  return Object.fromEntries(Object.entries(rows).map(([name, those]) => [name, {
    share: mean(those.map(({ i, keys }) => keys.reduce((sum, k) => sum + weights[i * T + k], 0))),
    chance: mean(those.map(({ chance }) => chance)), rows: those.length }]));
}

/** Whether a habit is far above chance. */
export const far = ({ share, chance, rows }) => rows > 1 && share >= 2 * chance && share >= chance + 0.1;

/** Of heads with their `habits`, the head and the name of the habit with the largest share above chance: {head, name}. Most
 *  heads give weight to the start, so that counts only where no head has another habit. null: no head has one. */
export function standsOut(heads) {
  const pairs = heads.flatMap((head) => Object.entries(head.habits).filter(([, habit]) => far(habit))
    .map(([name, { share, chance }]) => ({ head, name, above: share - chance - (name === "start" ? 1 : 0) })));
  return pairs.reduce((a, b) => a && a.above >= b.above ? a : b, null);
}
