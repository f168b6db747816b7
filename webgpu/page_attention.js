// The attention panel: a small map for each head, and a large one of the chosen head.

import { attention } from "./inside.js";
import { queueWith, finish, heard, make, percent, resultOf, seen, token } from "./page_common.js";
import { drawMap, roving, strength } from "./page_draw.js";

let redraw = () => {};

/** Draw the maps again, after colours or sizes have changed. */
export const drawAgain = () => redraw();

export const forgetMaps = () => { redraw = () => {}; };

export async function runAttention(model, ids) {
  const { enc } = model, { n_layer: L, n_head: H } = model.config, T = ids.length;
  const layers = await queueWith(model, () => attention(model, ids));
  const heads = Array.from({ length: L }, (_, l) => Array.from({ length: H }, (_, h) => {
    const weights = layers[l].subarray(h * T * T, (h + 1) * T * T);
    return { l, h, weights, ...habit(weights, ids, T) };
  }));
  const large = largeMap(enc, ids), small = smallMaps(heads, large.show);
  const columns = make("div", { class: "heads" }, small.node, large.node);
  finish("attention", [], columns);
  redraw = () => {
    if (!columns.offsetParent) return;
    heads.flat().forEach(({ canvas, weights }) => drawMap(canvas, weights, T));
    large.draw();
  };
  redraw();
  const { l, h, words } = heads.flat().reduce((a, b) => b.distinct > a.distinct ? b : a);
  small.choose(l, h);
  resultOf("attention").replaceChildren(`Layer ${l}, head ${h} stands out: it ${words}.`);
}

// ---- what a head does -----------------------------------------------------------------------------------------------

const HABITS = {
  start: ["start", "attends to the start of the text"], self: ["itself", "attends to the token itself"],
  previous: ["previous", "attends to the previous token"],
  again: ["induction", "attends to the token that followed an earlier copy of the current one (induction)"],
};

/** The habit to which a head gives most of its weight: {short, words, distinct}. distinct: how unusual the head is. */
function habit(map, ids, T) {
  const sums = { start: 0, self: 0, previous: 0, again: 0 };
  let repeats = 0;
  for (let i = 1; i < T; i++) {
    sums.start += map[i * T];
    sums.self += map[i * T + i];
    if (i > 1) sums.previous += map[i * T + i - 1];  // at 1, the previous token is the start
    const after = Array.from({ length: i }, (_, k) => k).filter((k) => k > 1 && ids[k - 1] === ids[i]);
    if (after.length) repeats += 1;
    sums.again += after.reduce((sum, k) => sum + map[i * T + k], 0);
  }
  const n = Math.max(1, T - 1);
  const shares = { start: sums.start / n, self: sums.self / n, previous: sums.previous / Math.max(1, n - 1),
    again: repeats > 1 ? sums.again / repeats : 0 };
  const [kind, share] = Object.entries(shares).reduce((a, b) => b[1] > a[1] ? b : a);
  if (share < 0.3) return { short: "spread", words: "attends to many tokens", distinct: 0 };
  const [short, words] = HABITS[kind];
  const distinct = kind === "start" ? share / 100 : share;  // most heads attend to the start
  return { short, words: `${words} (${percent(share)} of its weight)`, distinct };
}

// ---- small maps -----------------------------------------------------------------------------------------------------

/** A button with a map for each head, layer 0 at the bottom. show(head) is called for the one that is chosen. */
function smallMaps(heads, show) {
  const node = make("div", { class: "maps", role: "radiogroup", "aria-label": "Heads, by layer" });
  const buttons = heads.map((line) => line.map((head) => {
    head.canvas = make("canvas", {});
    const { l, h, words, canvas, short } = head;
    return make("button", { type: "button", role: "radio", "aria-checked": "false", tabindex: -1, title: words,
      "aria-label": `Layer ${l}, head ${h}: ${words}`, "data-r": l, "data-c": h }, canvas, short);
  }));
  buttons.forEach((line, l) => node.prepend(make("div", {}, make("span", {}, `layer ${l}`), ...line)));
  const check = (l, h) => {
    buttons.flat().forEach((button) => button.setAttribute("aria-checked", button === buttons[l][h]));
    show(heads[l][h]);
  };
  const stopAt = roving(node, buttons, (l, h) => { if (document.activeElement === buttons[l][h]) check(l, h); });
  node.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button) check(Number(button.dataset.r), Number(button.dataset.c));
  });
  return { node, choose: (l, h) => { stopAt(l, h); check(l, h); } };
}

// ---- the large map --------------------------------------------------------------------------------------------------

/** One head's map with a cursor, a sentence about the weight at the cursor, and the prompt, coloured by the weights of the
 *  cursor's row. */
function largeMap(enc, ids) {
  const T = ids.length, labels = ids.map((id) => seen(enc, id)), title = make("h3", {});
  const canvas = make("canvas", { tabindex: 0, role: "img" });
  const said = make("p", { class: "said", "aria-live": "polite" });
  const strip = make("p", { class: "strip", "aria-hidden": "true" });
  strip.append(...labels.map((label) => make("span", {}, label.replaceAll("↵", "↵\n"))));
  const node = make("div", { class: "large" }, title, make("div", { class: "plot" }, canvas), said, strip);
  let head = null, at = null;

  const draw = () => {
    if (!head) return;
    const [i, j] = at, row = head.weights.subarray(i * T, i * T + T), share = percent(row[j]);
    drawMap(canvas, head.weights, T, { at, labels });
    title.textContent = `Layer ${head.l}, head ${head.h}`;
    said.replaceChildren(`Token ${i}, `, token(enc, ids[i]), `, attends to token ${j}, `, token(enc, ids[j]),
      `: ${share}`);
    canvas.setAttribute("aria-label", `${title.textContent}. Token ${i}, ${heard(enc, ids[i])}, attends to token ${j}, ` +
      `${heard(enc, ids[j])}: ${share}. Arrow keys move to other tokens.`);
    [...strip.children].forEach((part, k) => {
      const size = k <= i ? Math.sqrt(row[k]) : 0;
      part.style.setProperty("--s", size.toFixed(3));
      part.className = `${strength(size)} ${k === i ? "at" : ""}`;
      part.title = k <= i ? percent(row[k]) : "";
    });
  };
  const show = (other) => {
    head = other;
    const last = head.weights.subarray((T - 1) * T);
    at ??= [T - 1, last.indexOf(Math.max(...last))];
    draw();
  };
  pointAt(canvas, T, (i, j) => {
    const row = Math.min(T - 1, Math.max(0, i));
    at = [row, Math.min(row, Math.max(0, j))];
    draw();
  }, () => at);
  return { node, show, draw };
}

/** Call tell(row, column) when the pointer or the arrow keys move. where(): the current row and column. */
function pointAt(canvas, T, tell, where) {
  const follow = ({ clientX, clientY }) => {
    const { left, top, height } = canvas.getBoundingClientRect();
    tell(Math.floor((clientY - top) / height * T), Math.floor((clientX - left) / height * T));
  };
  canvas.addEventListener("pointermove", follow);
  canvas.addEventListener("pointerdown", follow);
  canvas.addEventListener("keydown", (event) => {
    const [i, j] = where();
    const moves = { ArrowUp: [i - 1, j], ArrowDown: [i + 1, j], ArrowLeft: [i, j - 1], ArrowRight: [i, j + 1],
      Home: [i, 0], End: [i, i] };
    if (!moves[event.key]) return;
    event.preventDefault();
    tell(...moves[event.key]);
  });
}
