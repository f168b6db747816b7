// The attention panel: a small map for each head, and a large one of the chosen head.

import { far, HABITS, habits, rowsOf, standsOut } from "./habits.js";
import { attention } from "./inside.js";
import { $, queueWith, finish, heard, make, percent, resultOf, seen, token } from "./page_common.js";
import { drawMap, key, roving, strength } from "./page_draw.js";

let redraw = () => {}, choose = () => {};

/** Draw the maps again, after colours or sizes have changed. */
export const drawAgain = () => redraw();

/** Show the head that the field names, as 2.0: layer 2, head 0. */
export const showHead = () => choose(...$("head").value.split(".").map(Number));

export const forgetMaps = () => { redraw = choose = () => {}; };

export async function runAttention(model, ids, { signal }) {
  const { enc, heads: H } = model, { n_layer: L } = model.config, T = ids.length;
  const layers = await queueWith(model, () => attention(model, ids, signal), signal);
  const heads = Array.from({ length: L }, (_, l) => {
    let rows = rowsOf(ids, model.windowOf(l));
    if (model.sinksOf(l)) rows = rowsOf(ids, model.windowOf(l), null, model.config.sinks);  // sinks
    if (model.config.mod === "topk") rows = rowsOf(ids, model.windowOf(l), layers[l]);  // mod
    return Array.from({ length: H }, (_, h) => {
      const weights = layers[l].subarray(h * T * T, (h + 1) * T * T);
      return { l, h, weights, habits: habits(weights, T, rows) };
    });
  });
  const large = largeMap(enc, ids), small = smallMaps(heads, large.show);
  const columns = make("div", { class: "heads" }, small.node, large.node);
  finish("attention", [], columns);
  redraw = () => {
    if (!columns.offsetParent) return;
    heads.flat().forEach(({ canvas, weights }) => drawMap(canvas, weights, T));
    large.draw();
  };
  redraw();
  const most = standsOut(heads.flat()), { l, h } = most?.head ?? heads.at(-1).at(-1);
  choose = (layer, head) => heads[layer]?.[head] && small.choose(layer, head);
  small.choose(l, h);
  showHead();
  resultOf("attention").replaceChildren(most ? `Layer ${l}, head ${h} stands out: it ${habitInWords(most.head, most.name)}.` :
    "No head stands out: none has a habit far above chance.");
  if (model.config.diff_attn) resultOf("attention").append(" Each map is the difference of two heads' maps, A1 − λ A2; weights below 0 are not drawn.");  // diff
}

// ---- what a head does -----------------------------------------------------------------------------------------------

const isFar = (head) => Object.keys(HABITS).filter((name) => far(head.habits[name]));

function habitInWords(head, name) {
  const { share, chance } = head.habits[name];
  return `${HABITS[name]} (${percent(share)} of its weight; by chance ${percent(chance)})`;
}

/** What a head does, in words: each habit that is far above chance. */
const inWords = (head) => isFar(head).map((name) => habitInWords(head, name)).join(", and ") || "attends to many tokens";

/** A table of a head's habits beside chance. */
function habitTable(head) {
  const line = (name, { share, chance, rows }) => make("tr", { class: far({ share, chance, rows }) ? "far" : null },
    make("th", { scope: "row", title: `It ${HABITS[name]}` }, name),
    ...rows ? [make("td", {}, percent(share)), make("td", {}, percent(chance))] :
      [make("td", { colspan: 2 }, "not possible in this text")]);
  const titles = ["Habit", "Share", "By chance"].map((name) => make("th", { scope: "col" }, name));
  return make("table", { class: "habits" }, make("tr", {}, ...titles), ...Object.entries(head.habits).map((entry) => line(...entry)));
}

// ---- small maps -----------------------------------------------------------------------------------------------------

/** A button with a map for each head, layer 0 at the bottom. show(head) is called for the one that is chosen. */
function smallMaps(heads, show) {
  const node = make("div", { class: "maps", role: "radiogroup", "aria-label": "Heads, by layer" });
  const buttons = heads.map((line) => line.map((head) => {
    head.canvas = make("canvas", {});
    const { l, h, canvas } = head, words = inWords(head);
    return make("button", { type: "button", role: "radio", "aria-checked": "false", tabindex: -1, title: words,
      "aria-label": `Layer ${l}, head ${h}: ${words}`, "data-r": l, "data-c": h }, canvas, `${h}: ${isFar(head).join(", ") || "spread"}`);
  }));
  buttons.forEach((line, l) => node.prepend(make("div", {}, make("span", {}, `layer ${l}`), ...line)));
  const check = (l, h) => {
    buttons.flat().forEach((button) => button.setAttribute("aria-checked", button === buttons[l][h]));
    show(heads[l][h]);
  };
  const pick = (l, h) => {
    $("head").value = `${l}.${h}`;  // for a link to it, and for the maps of the next prompt
    check(l, h);
  };
  const stopAt = roving(node, buttons, (l, h) => { if (document.activeElement === buttons[l][h]) pick(l, h); });
  node.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button) pick(Number(button.dataset.r), Number(button.dataset.c));
  });
  return { node, choose: (l, h) => { stopAt(l, h); check(l, h); } };
}

// ---- the large map --------------------------------------------------------------------------------------------------

const NEAREST = 8;  // cells beside each other, in the nearest view

/** One head's map with a cursor, of which a part can be shown larger; a sentence about the weight at the cursor; the prompt,
 *  coloured by the weights of the cursor's row; and the head's habits. */
function largeMap(enc, ids) {
  const T = ids.length, labels = ids.map((id) => seen(enc, id)), title = make("h3", {});
  const canvas = make("canvas", { tabindex: 0, role: "img" });
  const said = make("p", { class: "said", "aria-live": "polite" });
  const strip = make("p", { class: "strip", "aria-hidden": "true" }), table = make("div", {});
  strip.append(...labels.map((label) => make("span", {}, label.replaceAll("↵", "↵\n"))));
  const zoom = (label, by, says) => make("button", { type: "button", class: "plain small", title: says,
    onclick: () => magnify(by) }, label);
  const nearer = zoom("zoom in", 0.5, "Show fewer tokens, larger (key: +)");
  const farther = zoom("zoom out", 2, "Show more tokens, smaller (key: −)");
  const legend = key("0%", "100% of a token's attention");
  legend.append(make("span", {}, "The colour of 25% is half as strong as that of 100%."));
  const node = make("div", { class: "large" },
    make("div", { class: "row between" }, title, make("span", { class: "row" }, nearer, farther)), make("div", { class: "plot" }, canvas),
    legend, table, said, strip);
  let head = null, at = null, n = T, corner = [0, 0], side = 1;

  const draw = () => {
    if (!head) return;
    const [i, j] = at, row = head.weights.subarray(i * T, i * T + T), share = percent(row[j]);
    side = drawMap(canvas, head.weights, T, { at, labels, part: n < T ? [...corner, n] : null });
    [nearer.disabled, farther.disabled] = [n <= NEAREST, n === T];
    title.textContent = `Layer ${head.l}, head ${head.h}`;
    said.replaceChildren(`Token ${i}, `, token(enc, ids[i]), `, attends to token ${j}, `, token(enc, ids[j]),
      `: ${share}`);
    canvas.setAttribute("aria-label", `${title.textContent}. Token ${i}, ${heard(enc, ids[i])}, attends to token ${j}, ` +
      `${heard(enc, ids[j])}: ${share}. Arrow keys move to other tokens, plus and minus change the size.`);
    [...strip.children].forEach((part, k) => {
      const size = k <= i ? Math.sqrt(Math.max(0, row[k])) : 0;
      part.style.setProperty("--s", size.toFixed(3));
      part.className = `${strength(size)} ${k === i ? "at" : ""}`;
      part.title = k <= i ? percent(row[k]) : "";
    });
  };
  const show = (other) => {
    head = other;
    table.replaceChildren(habitTable(head));
    const last = head.weights.subarray((T - 1) * T);
    at ??= [T - 1, last.indexOf(Math.max(...last))];
    draw();
  };
  const magnify = (by) => {
    n = Math.min(T, Math.max(NEAREST, Math.round(n * by)));
    corner = at.map((place) => Math.min(T - n, Math.max(0, place - (n >> 1))));
    draw();
  };
  const moveTo = (i, j) => {
    const row = Math.min(T - 1, Math.max(0, i));
    at = [row, Math.min(row, Math.max(0, j))];
    corner = corner.map((first, k) => Math.min(at[k], Math.max(first, at[k] - n + 1)));  // so that the cursor can be seen
    draw();
  };
  const follow = ({ clientX, clientY }) => {
    const { left, top } = canvas.getBoundingClientRect();
    const within = (place) => Math.min(n - 1, Math.max(0, Math.floor(place / side)));
    moveTo(corner[0] + within(clientY - top), corner[1] + within(clientX - left));
  };
  canvas.addEventListener("pointermove", follow);
  canvas.addEventListener("pointerdown", follow);
  canvas.addEventListener("keydown", (event) => {
    const [i, j] = at, act = { ArrowUp: () => moveTo(i - 1, j), ArrowDown: () => moveTo(i + 1, j), ArrowLeft: () => moveTo(i, j - 1),
      ArrowRight: () => moveTo(i, j + 1), Home: () => moveTo(i, 0), End: () => moveTo(i, i), "+": () => magnify(0.5),
      "=": () => magnify(0.5), "-": () => magnify(2) }[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
  return { node, show, draw };
}
