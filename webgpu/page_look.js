// The panels that look inside: lens, attention, ablation, patching. They share the prompt.

import { UserError } from "./errors.js";
import { ablate, attention, lens, loadLens, swap } from "./inside.js";
import { $, aloneWith, attempt, during, heard, idsOf, make, needModel, onModel, page, percent, seen } from "./page_common.js";
import { bars, drawMap, heatMap, key, roving, strength } from "./page_draw.js";
import { notWriting, textSoFar } from "./page_write.js";

// For each: what it is called while it runs, its fields beside the prompt, what they hold, and what shows the result.
const PANELS = {
  lens: { doing: "Reading through the lens", fields: ["colour", "lens"], values: ["colour", "tuned"], run: runLens },
  attention: { doing: "Following attention", fields: [], values: [], run: runAttention },
  ablation: { doing: "Switching parts off", fields: ["target", "how"], values: ["target", "how"], run: runAblation },
  patching: { doing: "Patching", fields: ["recipient", "target", "site", "pairs"], values: ["recipient", "target", "site", "pairs"], run: runPatching },
};

let chosen = "lens";
const shown = {};  // by panel: of which model and settings its figure is

const figureOf = (name) => document.querySelector(`#${name} .figure`);
const resultOf = (name) => document.querySelector(`#${name} .result`);

function choosePanel(name) {
  chosen = name;
  const panel = PANELS[name];
  if (!panel) return;
  $(name).querySelector(".about").after($("subject"), $("look-wrong"));
  for (const field of ["recipient", "target", "how", "site", "pairs", "colour"]) $(`${field}-field`).hidden = !panel.fields.includes(field);
  $("lens-field").hidden = name !== "lens" || !page.lenses;
  $("look-label").textContent = name === "patching" ? "Donor: a prompt that the target follows" : "Prompt";
  if (page.model && shown[name] !== keyOf(name)) look();
}

const keyOf = (name) => JSON.stringify([page.model?.serial, $("look-prompt").value,
  ...PANELS[name].values.map((id) => $(id).type === "checkbox" ? $(id).checked : $(id).value)]);

/** Compute and show the panel that is chosen. */
function look() {
  const name = chosen;
  return attempt("look-wrong", async () => {
    const model = needModel(), key = keyOf(name), ids = idsOf(model, $("look-prompt").value);
    shown[name] = key;
    const bar = make("progress", { max: 1, "aria-label": PANELS[name].doing });
    resultOf(name).replaceChildren(bar);
    try {
      await during("look", PANELS[name].doing, () => PANELS[name].run(model, ids, (share) => { bar.value = share; }));
    } catch (error) {
      resultOf(name).replaceChildren();
      delete shown[name];
      throw error;
    }
  });
}

/** The first look is the page's own, once the first text stands. */
export async function lookByItself() {
  await notWriting();
  const model = page.model;
  if (!PANELS[chosen] || !model || shown[chosen] === keyOf(chosen)) return;
  try {
    idsOf(model, $("look-prompt").value);
  } catch {
    return;  // a prompt that is not for this model: no one has asked for it
  }
  await look();
}

function finish(name, words, ...figure) {
  resultOf(name).replaceChildren(...words);
  figureOf(name).replaceChildren(...figure);
  for (const scroll of figureOf(name).querySelectorAll(".scroll")) scroll.scrollLeft = scroll.scrollWidth;
}

const token = (enc, id) => make("code", {}, seen(enc, id));
const columnsOf = (enc, ids) => ids.map((id, i) => ({ text: seen(enc, id), title: `position ${i}`, says: `position ${i}, ${heard(enc, id)}` }));

/** A number with its sign, and no sign for nothing. */
const signed = (x, plus = "+") => Math.abs(x) < 0.005 ? "0" : `${x < 0 ? "−" : plus}${Math.abs(x).toFixed(2)}`;

// ---- lens -----------------------------------------------------------------------------------------------------------

async function runLens(model, ids) {
  const { enc, n_vocab, config } = model, L = config.n_layer, byP = $("colour").value === "p";
  const lenses = $("tuned").checked ? page.lenses : null;
  const rows = await aloneWith(model, () => lens(model, ids, lenses));
  const said = make("p", { class: "said" }), list = make("ol", { class: "bars five" }), nameOf = (row) => row ? `layer ${row - 1}` : "embedding";
  const sure = ({ p, entropy }) => byP ? p[0] : 1 - entropy / Math.log2(n_vocab);
  const table = heatMap({
    caption: "The most probable next token after each layer and position", rows: rows.map((_, row) => nameOf(row)), columns: columnsOf(enc, ids),
    cell(r, c) {
      const { ids: best, p } = rows[r][c];
      return { text: seen(enc, best[0]), share: sure(rows[r][c]), says: `${nameOf(r)}, after ${heard(enc, ids[c])}: ${heard(enc, best[0])}, ${percent(p[0])}` };
    },
    onlook(r, c) {
      const { ids: best, p, entropy } = rows[r][c];
      said.replaceChildren(`After ${r ? `layer ${r - 1}${r === L ? ", where the model itself speaks" : ""}` : "the embedding alone"}, position ${c}, `,
        token(enc, ids[c]), ` – entropy ${entropy.toFixed(1)} bits`);
      bars(list, enc, best.map((id, i) => ({ id, p: p[i] })));
    },
  });
  const last = rows.map((row) => row.at(-1)), answer = last[L].ids[0];
  let first = L;
  while (first > 0 && last[first - 1].ids[0] === answer) first -= 1;
  const where = first === L ? "only at the end" : first === 0 ? "from the embedding on" : `from layer ${first - 1} on`;
  finish("lens", ["Next comes ", token(enc, answer), `, the model says (${percent(last[L].p[0])}). It is on top ${where}. `,
    lenses ? "Seen through tuned lenses." : page.lenses ? "Seen through the logit lens." : "This is the logit lens; drop a .lenses file of tuned_lens.py for the tuned one."],
    said, list, make("div", { class: "scroll" }, table), key(byP ? ["unsure", "sure: 100%"] : ["could be anything", "certain"]));
}

/** A sidecar of tuned_lens.py. */
export async function takeLens(file) {
  const well = await attempt("look-wrong", async () => {
    const model = needModel(), lenses = await during("look", `Reading ${file.name}`, () => aloneWith(model, () => loadLens(model, file)));
    if (model === page.model) page.lenses = lenses;
  });
  if (!well) return;
  $("tuned").checked = true;
  delete shown.lens;
  choosePanel("lens");
}

// ---- attention ------------------------------------------------------------------------------------------------------

async function runAttention(model, ids) {
  const { enc } = model, { n_layer: L, n_head: H } = model.config, T = ids.length;
  const layers = await aloneWith(model, () => attention(model, ids));
  const weights = (layer, head) => layers[layer].subarray(head * T * T, (head + 1) * T * T);
  const canvas = make("canvas", { tabindex: 0, role: "img" }), said = make("p", { class: "said result", "aria-live": "polite" });
  const strip = make("p", { class: "strip", "aria-hidden": "true" }, ...ids.map((id) => make("span", {}, seen(enc, id).replaceAll("↵", "↵\n"))));
  const labels = ids.map((id) => seen(enc, id));
  let [layer, head, at] = [0, 0, null];
  const show = () => {
    const map = weights(layer, head);
    at ??= [T - 1, map.subarray((T - 1) * T).reduce((best, weight, j, row) => weight > row[best] ? j : best, 0)];
    const [i, j] = at;
    drawMap(canvas, map, T, { at, labels });
    const words = `Token ${i}, ${heard(enc, ids[i])}, looks at token ${j}, ${heard(enc, ids[j])}: ${percent(map[i * T + j])}`;
    canvas.setAttribute("aria-label", `Layer ${layer}, head ${head}. ${words}. Arrow keys go to other tokens.`);
    said.replaceChildren(`Token ${i}, `, token(enc, ids[i]), `, looks at token ${j}, `, token(enc, ids[j]), `: ${percent(map[i * T + j])}`);
    [...strip.children].forEach((node, k) => {
      const weight = k <= i ? map[i * T + k] : 0;
      node.style.setProperty("--s", Math.sqrt(weight).toFixed(3));
      node.className = `${strength(Math.sqrt(weight))} ${k === i ? "at" : ""}`;
      node.title = k <= i ? percent(weight) : "";
    });
  };
  const buttons = [], maps = make("div", { class: "maps", role: "radiogroup", "aria-label": "Heads, by layer" });
  for (let l = 0; l < L; l++) {
    buttons[l] = Array.from({ length: H }, (_, h) => {
      const { words, short } = habit(weights(l, h), ids, T);
      return make("button", { type: "button", role: "radio", "aria-checked": "false", tabindex: -1, "data-r": l, "data-c": h, title: words,
        "aria-label": `Layer ${l}, head ${h}: ${words}` }, make("canvas", {}), short);
    });
    maps.prepend(make("div", {}, make("span", {}, `layer ${l}`), ...buttons[l]));
  }
  const title = make("h3", {});
  const choose = (l, h) => {
    buttons.flat().forEach((node) => node.setAttribute("aria-checked", node === buttons[l][h]));
    [layer, head] = [l, h];
    title.textContent = `Layer ${l}, head ${h}`;
    show();
  };
  finish("attention", [], make("div", { class: "heads" }, maps, make("div", { class: "large" }, title, make("div", { class: "plot" }, canvas), said, strip)));
  buttons.forEach((line, l) => line.forEach((node, h) => drawMap(node.querySelector("canvas"), weights(l, h), T)));
  drawn = () => {
    buttons.forEach((line, l) => line.forEach((node, h) => drawMap(node.querySelector("canvas"), weights(l, h), T)));
    show();
  };
  const stopAt = pickers(maps, buttons, choose);
  pointAt(canvas, T, (i, j) => { at = [i, j]; show(); }, () => at);
  const found = buttons.flatMap((line, l) => line.map((_, h) => [habit(weights(l, h), ids, T), l, h]));
  const [strongest, l, h] = found.reduce((a, b) => (b[0].kind !== "start" && b[0].share > (a[0].kind === "start" ? 0 : a[0].share) ? b : a));
  stopAt(l, h);
  choose(l, h);
  resultOf("attention").replaceChildren(`Layer ${l}, head ${h} stands out: it ${strongest.words}.`);
}

let drawn = () => {};  // draws the maps again, in other colours or sizes

/** Heads are chosen by a click or with the arrow keys. */
function pickers(maps, buttons, choose) {
  maps.addEventListener("click", ({ target }) => {
    const node = target.closest("button");
    if (node) choose(Number(node.dataset.r), Number(node.dataset.c));
  });
  return roving(maps, buttons, (l, h) => { if (document.activeElement === buttons[l][h]) choose(l, h); });
}

function pointAt(canvas, T, tell, where) {
  const within = (n) => Math.min(T - 1, Math.max(0, n));
  const follow = (event) => {
    const box = canvas.getBoundingClientRect(), i = within(Math.floor((event.clientY - box.top) / box.height * T));
    tell(i, Math.min(i, within(Math.floor((event.clientX - box.left) / box.height * T))));
  };
  canvas.addEventListener("pointermove", follow);
  canvas.addEventListener("pointerdown", follow);
  canvas.addEventListener("keydown", (event) => {
    const [i, j] = where(), to = { ArrowUp: [i - 1, j], ArrowDown: [i + 1, j], ArrowLeft: [i, j - 1], ArrowRight: [i, j + 1], Home: [i, 0], End: [i, i] }[event.key];
    if (!to) return;
    event.preventDefault();
    const row = within(to[0]);
    tell(row, Math.min(row, within(to[1])));
  });
}

/** What a head mostly does, by the mean weight of four habits: {words, short, kind, share}. */
function habit(map, ids, T) {
  const sums = { start: 0, self: 0, previous: 0, again: 0 };
  let repeats = 0;
  for (let i = 1; i < T; i++) {
    sums.start += map[i * T];
    sums.self += map[i * T + i];
    if (i > 1) sums.previous += map[i * T + i - 1];
    const after = ids.slice(0, i - 1).flatMap((id, k) => id === ids[i] && k > 0 ? [k + 1] : []);  // what followed the same token before
    if (after.length) {
      repeats += 1;
      sums.again += after.reduce((sum, k) => sum + map[i * T + k], 0);
    }
  }
  const n = Math.max(1, T - 1), shares = { start: sums.start / n, self: sums.self / n, previous: sums.previous / Math.max(1, n - 1),
    again: repeats > 1 ? sums.again / repeats : 0 };
  const [kind, share] = Object.entries(shares).reduce((a, b) => b[1] > a[1] ? b : a);
  const words = { start: "rests on the start", self: "looks at the token itself", previous: "looks at the previous token",
    again: "looks at what followed the same token before (induction)" }[kind];
  if (share < 0.3) return { words: "spreads its attention", short: "spread", kind: "spread", share: 0 };
  return { words: `${words} (${percent(share)} of its weight)`, short: { start: "start", self: "itself", previous: "previous", again: "induction" }[kind], kind, share };
}

// ---- ablation -------------------------------------------------------------------------------------------------------

/** The first token of the target that was typed, and words if there are more. */
function targetOf(model) {
  const text = $("target").value;
  if (!text) throw new UserError("There is no target: type the token that should come next, with its blank, as in “ name”.");
  const ids = model.enc.encode(text);
  return { target: ids[0], note: ids.length > 1 ? ` The target has ${ids.length} tokens; this is about the first of them.` : "" };
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);
const partName = (column, layer) => ({ attn: `layer ${layer}'s attention`, mlp: `layer ${layer}'s MLP`, block: `all of layer ${layer}` })[column] ??
  `layer ${layer}'s ${column}`;

async function runAblation(model, ids, onProgress) {
  const { enc } = model, { target, note } = targetOf(model);
  const { whole, columns, values } = await aloneWith(model, () => ablate(model, ids, target, $("how").value, onProgress));
  const said = make("p", { class: "said" }), most = Math.max(0.5, ...values.flat().map(Math.abs));
  const p = (change) => percent(Math.exp(whole + change));
  const table = heatMap({
    caption: "Change of the target's log-probability, by layer and part", rows: values.map((_, layer) => `layer ${layer}`), columns: columns.map((text) => ({ text })),
    cell: (r, c) => ({ text: signed(values[r][c]), share: values[r][c] / most, says: `without ${partName(columns[c], r)}: ${signed(values[r][c])} nats, ${p(values[r][c])}` }),
    onlook: (r, c) => said.replaceChildren(`Without ${partName(columns[c], r)}: `, token(enc, target), ` goes from ${p(0)} to ${p(values[r][c])}, ${signed(values[r][c])} nats`),
  });
  const parts = columns.map((name, c) => ({ name, c })).filter(({ name }) => name !== "block");
  const worst = values.flatMap((row, layer) => parts.map(({ name, c }) => ({ layer, name, value: row[c] }))).reduce((a, b) => b.value < a.value ? b : a);
  finish("ablation", [token(enc, target), ` has ${p(0)} after this prompt. ${capital(partName(worst.name, worst.layer))} matters most for it: without it, ${p(worst.value)}.${note}`],
    said, make("div", { class: "scroll" }, table), key([`−${most.toFixed(1)} nats: less probable without it`, `+${most.toFixed(1)}: more`, true]));
}

// ---- patching -------------------------------------------------------------------------------------------------------

/** "4:5, 6:7" as [[4, 5], [6, 7]]; null if nothing is typed. */
function pairsOf(text) {
  if (!text.trim()) return null;
  return text.split(",").map((part) => {
    const found = part.match(/^\s*(\d+)\s*:\s*(\d+)\s*$/);
    if (!found) throw new UserError(`“${part.trim()}” is no pair of positions: write the donor's and the recipient's, as in 4:5, 6:7.`);
    return [Number(found[1]), Number(found[2])];
  });
}

async function runPatching(model, donor, onProgress) {
  const { enc } = model, { target, note } = targetOf(model), recipient = idsOf(model, $("recipient").value), pairs = pairsOf($("pairs").value);
  const { clean, corrupt, values, tops } = await aloneWith(model, () => swap(model, donor, recipient, target, $("site").value, onProgress, pairs));
  const said = make("p", { class: "said" }), places = pairs ?? recipient.map((_, i) => [i, i]);
  const columns = places.map(([i, j]) => {
    const same = donor[i] === recipient[j];
    return { text: same ? seen(enc, recipient[j]) : `${seen(enc, donor[i])}→${seen(enc, recipient[j])}`, title: i === j ? `position ${i}` : `${i}:${j}`,
      says: `position ${j}, ${heard(enc, donor[i])}${same ? "" : ` in place of ${heard(enc, recipient[j])}`}` };
  });
  const p = (value) => percent(Math.exp(corrupt + value * (clean - corrupt)));
  const where = (r, c) => `layer ${r}, ${columns[c].says}`;
  const table = heatMap({
    caption: "Share of the donor's answer that one state brings back, by layer and position", rows: values.map((_, layer) => `layer ${layer}`), columns,
    cell: (r, c) => ({ text: signed(values[r][c], ""), share: values[r][c], says: `${where(r, c)}: effect ${values[r][c].toFixed(2)}, ${heard(enc, target)} ${p(values[r][c])}, on top ${heard(enc, tops[r][c])}` }),
    onlook: (r, c) => said.replaceChildren(`Layer ${r}, position ${places[c][1]}: `, token(enc, target), ` goes from ${percent(Math.exp(corrupt))} to ${p(values[r][c])} (with the donor's prompt: ${percent(Math.exp(clean))}); on top then `,
      token(enc, tops[r][c])),
  });
  const cells = values.flatMap((row, r) => row.map((value, c) => ({ r, c, value })));
  const best = cells.reduce((a, b) => b.value > a.value ? b : a), differs = ({ c }) => donor[places[c][0]] !== recipient[places[c][1]];
  const moved = cells.filter((each) => !differs(each)).reduce((a, b) => !a || b.value > a.value ? b : a, null);
  const at = ({ r, c, value }) => [`layer ${r} of `, make("code", {}, columns[c].text), ` (${signed(value, "")})`];
  finish("patching", [token(enc, target), ` has ${percent(Math.exp(clean))} after the donor and ${percent(Math.exp(corrupt))} after the recipient. Most comes back at `, ...at(best),
    ...(moved && differs(best) ? ["; of the words that are the same in both, at ", ...at(moved)] : []), `.${note}`],
    said, make("div", { class: "scroll" }, table), key(["−1: the other way", "1: all of it", true]));
}

// ---- setting up -----------------------------------------------------------------------------------------------------

export function setUpLooking() {
  document.addEventListener("panel", ({ detail: name }) => choosePanel(name));
  document.addEventListener("colours", () => drawn());
  addEventListener("resize", () => drawn());
  $("subject").addEventListener("submit", (event) => {
    event.preventDefault();
    look();
  });
  for (const id of ["colour", "tuned", "how", "site"]) $(id).addEventListener("change", look);
  for (const id of ["look-prompt", "recipient"]) $(id).addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    look();
  });
  $("take-text").addEventListener("click", () => {
    $("look-prompt").value = textSoFar();
    $("look-prompt").dispatchEvent(new Event("input", { bubbles: true }));
    look();
  });
  onModel((model) => {
    if (model) model.serial = serial += 1;
    drawn = () => {};
    for (const name of Object.keys(PANELS)) {
      delete shown[name];
      resultOf(name).replaceChildren();
      figureOf(name).replaceChildren();
    }
    $("lens-field").hidden = true;
  });
  choosePanel("lens");
}

let serial = 0;
