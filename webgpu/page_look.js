// The panels that look inside the model: lens, attention, ablation, patching. They share a prompt.

import { Stopped, UserError } from "./errors.js";
import { imported } from "./fetching.js";
import { ablate, lens, loadLens, swap } from "./inside.js";
import { drawAgain, forgetMaps, runAttention, showHead } from "./page_attention.js";
import { $, queueWith, attempt, count, during, finish, heard, idsOf, make, needModel, onModel, page, partName, percent, resultOf,
  say, seen, showFigure, stateName, token } from "./page_common.js";
import { bars, heatMap, key } from "./page_draw.js";
import { notWriting, textSoFar } from "./page_write.js";

// For each: the words shown while it runs, its fields besides the prompt, and the function that computes and shows it. places:
// fields that say which part of the figure is looked at.
const PANELS = {
  flow: { doing: "Computing all parts", fields: [], run: async (...all) => (await imported("page_flow.js")).runFlow(...all) },
  lens: { doing: "Reading through the lens", fields: ["colour", "tuned"], run: runLens },
  attention: { doing: "Following attention", fields: [], places: ["head"], run: runAttention },
  ablation: { doing: "Switching parts off", fields: ["target", "how"], run: runAblation },
  patching: { doing: "Patching", fields: ["recipient", "target", "site", "pairs"], run: runPatching },
};
/** Whether a panel computes its figure when it is opened, and the fields that it is computed from. */
export const looksByItself = (name) => name in PANELS;
export const fieldsOf = (name) => ["look-prompt", ...PANELS[name].fields, ...PANELS[name].places ?? []];

const FIELDS = [...new Set(Object.values(PANELS).flatMap(({ fields }) => fields))];

const MOMENT = 400;  // milliseconds after which a computation shows its Stop button

let chosen = "lens";
const shown = {};  // by panel: the model and the settings of its figure, see keyOf()
const running = {};  // by panel: the AbortController of its computation
let serial = 0;    // of the model

function choosePanel(name) {
  chosen = name;
  if (!PANELS[name]) return;
  const { fields } = PANELS[name];
  $(name).querySelector(".about").after($("subject"), $("examples"), $("look-wrong"));
  const has = (field) => fields.includes(field) && (field !== "tuned" || page.lenses);
  for (const field of FIELDS) $(`${field}-field`).hidden = !has(field);
  $("look-label").textContent = name === "patching" ? "Donor: a prompt that the target follows" : "Prompt";
  say("look-wrong", "");
  if (page.model && shown[name] !== keyOf(name)) look();
  else if (name === "attention") showHead();
}

const valueOf = (id) => $(id).type === "checkbox" ? $(id).checked : $(id).value;
const keyOf = (name) => JSON.stringify([serial, valueOf("look-prompt"), ...PANELS[name].fields.map(valueOf)]);

/** Compute the chosen panel and show it. */
function look() {
  const name = chosen, { doing, run } = PANELS[name];
  return attempt("look-wrong", async () => {
    const model = needModel(), ids = idsOf(model, $("look-prompt").value), own = new AbortController();
    running[name]?.abort(new Stopped());
    running[name] = own;
    shown[name] = keyOf(name);
    showProgress(name, doing, own);
    try {
      await during(`look ${name}`, doing, () => run(model, ids, own));
    } catch (error) {
      if (running[name] !== own) return;  // another one was begun
      resultOf(name).replaceChildren(own.signal.aborted ? "Stopped: press Look to compute it." : "");
      delete shown[name];
      throw error;
    }
  });
}

/** Show in a panel's result that it is computed: a progress bar and, after a moment, `words` and a button that aborts `own`. */
function showProgress(name, words, own) {
  const bar = make("progress", { max: 1, "aria-label": PANELS[name].doing }), left = make("span", {}, `${words}.`);
  const stop = () => {
    own.abort(new Stopped());
    $("look").focus();  // the button that had the focus will go
  };
  const row = make("div", { class: "row steps", "aria-live": "off", hidden: true }, left,
    make("button", { type: "button", onclick: stop }, "Stop"));
  setTimeout(() => { row.hidden = false; }, MOMENT);
  resultOf(name).replaceChildren(bar, row);
  return { bar, left };
}

/** Take the steps of a computation of inside.js one by one, until the last one or until `own` is aborted, and meanwhile show
 *  a progress bar, the time that is left, and `words`: what is computed. draw(step, over) shows the figure; over: the step is
 *  the last. Layers that are done are drawn from time to time, and also when the Stop button was pressed. */
async function inSteps(name, model, steps, own, words, draw) {
  const { bar, left } = showProgress(name, words, own), { signal } = own;
  const began = performance.now(), figure = document.querySelector(`#${name} .figure`);
  let last = null, drawn = began;
  try {
    for (;;) {
      const { value, done } = await queueWith(model, () => signal.aborted ? { done: true } : steps.next());
      if (done || signal.aborted) break;
      last = value;
      bar.value = value.share;
      const now = performance.now(), rest = (now - began) * (1 - value.share) / value.share;
      left.textContent = value.share ? `${words}: about ${duration(rest)} left.` : `${words}.`;
      if (now - drawn < 1500 || figure.matches(":hover, :focus-within") || !value.values.some(Boolean)) continue;
      drawn = now;
      draw(value, false);
    }
  } finally {
    steps.return();
  }
  if (!last) signal.throwIfAborted();  // stopped before its turn
  if (running[name] === own) draw(last, true);
}

/** Compute a panel without being asked, once the first text is written. */
export async function lookByItself() {
  await notWriting();
  const { model } = page;
  if (!PANELS[chosen] || !model || shown[chosen] === keyOf(chosen)) return;
  try {
    idsOf(model, $("look-prompt").value);
  } catch {
    return;  // this model cannot read the prompt: no message, as the user has not asked
  }
  await look();
}

/** A number with its sign; 0 has none. */
const signed = (x, plus = "+") => Math.abs(x) < 0.005 ? "0" : `${x < 0 ? "−" : plus}${Math.abs(x).toFixed(2)}`;
const scrolled = (table) => make("div", { class: "scroll" }, table);

// A figure of which only the last layers are computed.
const NOTHING = { text: "", share: 0, says: "This row is not computed." };
const STOPPED = "Stopped before the first layer was done.";
const untilNow = (values, rows) => values[0] ? "" : ` Stopped: the rows below “${rows[values.findIndex(Boolean)]}” are not computed.`;

/** Milliseconds in words. */
const duration = (ms) => ms < 90_000 ? `${Math.max(1, Math.round(ms / 1000))} s` : `${Math.round(ms / 60_000)} min`;

/** stateName() in a sentence. */
const stateOf = (row) => row ? `the state ${stateName(row)}` : "the embedding";

// ---- lens -----------------------------------------------------------------------------------------------------------

async function runLens(model, ids, { signal }) {
  const lenses = $("tuned").checked ? page.lenses : null;
  showLens(model, ids, await queueWith(model, () => lens(model, ids, lenses, signal), signal), lenses);
}

/** Show the predictions rows[state][position], see lens(), in the lens panel. */
export function showLens({ enc, n_vocab }, ids, rows, lenses = null) {
  const byP = $("colour").value === "p", last = rows.length - 1;
  const said = make("p", { class: "said" }), list = make("ol", { class: "bars five" });
  const columns = ids.map((id, i) => ({ text: seen(enc, id), says: `position ${i}, ${heard(enc, id)}` }));
  const table = heatMap({
    caption: "The most probable next token, read from each state of the residual stream, by position",
    axis: "residual stream",
    rows: rows.map((_, row) => stateName(row)),
    columns,
    cell(r, c) {
      const { ids: [best], p: [p], entropy } = rows[r][c];
      return { text: seen(enc, best), share: byP ? p : 1 - entropy / Math.log2(n_vocab),
        says: `${stateName(r)}, ${columns[c].says}: ${heard(enc, best)}, ${percent(p)}` };
    },
    onlook(r, c) {
      const { ids: best, p, entropy } = rows[r][c];
      const itself = r === last ? " (the model's own prediction)" : "";
      said.replaceChildren(`Read from ${stateOf(r)}${itself} at position ${c}, `, token(enc, ids[c]),
        `: entropy ${entropy.toFixed(1)} bits`);
      bars(list, enc, best.map((id, i) => ({ id, p: p[i] })));
    },
  });
  finish("lens", lensInWords(enc, rows.map((row) => row.at(-1)), lenses), said, list, scrolled(table),
    key(...byP ? ["unsure", "sure: 100%"] : ["high entropy: unsure", "low entropy: sure"]));
}

/** A sentence about the next token, and from which state on it is the most probable one. found: the prediction from each state
 *  at the last position. */
function lensInWords(enc, found, lenses) {
  const last = found.length - 1, { ids: [answer], p: [p] } = found[last];
  let first = last;
  while (first > 0 && found[first - 1].ids[0] === answer) first -= 1;
  const where = first === last ? "only after the last layer" : `from ${stateOf(first)} on`;
  const through = lenses ? "Seen through tuned lenses." : page.lenses ? "Seen through the logit lens." :
    "This is the logit lens; for the tuned lens, drop a .lenses file of tuned_lens.py here.";
  return ["The model predicts ", token(enc, answer), ` (${percent(p)}). This token is the most probable one ${where}. ${through}`];
}

/** Load a sidecar file of tuned_lens.py. */
export async function takeLens(file) {
  const well = await attempt("look-wrong", async () => {
    const model = needModel();
    const lenses = await during("look", `Reading ${file.name}`, () => queueWith(model, () => loadLens(model, file)));
    if (model === page.model) page.lenses = lenses;
  });
  if (!well) return;
  $("tuned").checked = true;
  delete shown.lens;
  choosePanel("lens");
}

// ---- ablation -------------------------------------------------------------------------------------------------------

/** The first token of the target that was typed, and a note if there are more. */
function targetOf(model) {
  const text = $("target").value;
  if (!text) throw new UserError("There is no target: type the token that comes next, with its blank, as in “ name”.");
  const ids = model.enc.encode(text);
  const note = ids.length > 1 ? ` The target has ${ids.length} tokens; this is about the first of them.` : "";
  return { target: ids[0], note };
}

const PARTS = { attn: "attention", mlp: "MLP", block: "whole layer" };

async function runAblation(model, ids, own) {
  const { target, note } = targetOf(model), { n_layer } = model.config;
  await inSteps("ablation", model, ablate(model, ids, target, $("how").value), own,
    `${count(n_layer * (model.heads + 3))} parts are switched off in turn`, (step, over) => showAblation(model, target, note, step, over));
}

function showAblation({ enc }, target, note, { whole, columns, values }, over) {
  const done = values.filter(Boolean);
  if (!done.length) return finish("ablation", [STOPPED]);
  const said = make("p", { class: "said" }), most = Math.max(0.5, ...done.flat().map(Math.abs));
  const p = (change) => percent(Math.exp(whole + change)), rows = values.map((_, layer) => `layer ${layer}`);
  const table = heatMap({
    caption: "Change of the target's log-probability, by layer and part",
    axis: "without",
    rows,
    columns: columns.map((name) => ({ text: PARTS[name] ?? name })),
    cell(r, c) {
      if (!values[r]) return NOTHING;
      const value = values[r][c];
      return { text: signed(value), share: value / most,
        says: `without ${partName(r, columns[c])}: ${signed(value)} nats, ${p(value)}` };
    },
    onlook(r, c) {
      if (!values[r]) return said.replaceChildren(NOTHING.says);
      said.replaceChildren(`Without ${partName(r, columns[c])}: `, token(enc, target),
        ` goes from ${p(0)} to ${p(values[r][c])}, ${signed(values[r][c])} nats`);
    },
  });
  const figure = [said, scrolled(table), key(`−${most.toFixed(1)} nats: less probable without the part`, `+${most.toFixed(1)}: more probable`, true)];
  if (!over) return showFigure("ablation", figure);
  const [c, r] = lowest(values.map((row) => columns.map((name, i) => name === "block" || !row ? 0 : row[i])));
  finish("ablation", [token(enc, target), ` has a probability of ${p(0)} after this prompt. It depends most on ` +
    `${partName(r, columns[c])}: without that part it is ${p(values[r][c])}.${note}${untilNow(values, rows)}`], ...figure);
}

/** [column, row] of the lowest number. */
function lowest(rows) {
  const all = rows.flat(), at = all.indexOf(Math.min(...all));
  return [at % rows[0].length, Math.floor(at / rows[0].length)];
}

// ---- patching -------------------------------------------------------------------------------------------------------

/** "4:5, 6:7" as [[4, 5], [6, 7]]; null if nothing is typed. */
function pairsOf(text) {
  if (!text.trim()) return null;
  return text.split(",").filter((part) => part.trim()).map((part) => {
    const found = part.match(/^\s*(\d+)\s*:\s*(\d+)\s*$/);
    if (!found) {
      throw new UserError(`“${part.trim()}” is no pair of positions: write the donor's and the recipient's position, as ` +
        "in 4:5, 6:7.");
    }
    return [Number(found[1]), Number(found[2])];
  });
}

async function runPatching(model, donor, own) {
  const { enc } = model, { target, note } = targetOf(model), site = $("site").value;
  if (!$("recipient").value) throw new UserError("There is no recipient: type the prompt in which the donor's states are put.");
  const recipient = idsOf(model, $("recipient").value), pairs = pairsOf($("pairs").value);
  const columns = (pairs ?? recipient.map((_, i) => [i, i])).map(([i, j]) => ({
    ...placeOf(enc, donor[i], recipient[j], j), place: pairs ? `${i}:${j}` : j }));
  await inSteps("patching", model, swap(model, donor, recipient, target, site, pairs), own,
    `${count(model.config.n_layer * columns.length)} states are replaced in turn`,
    (step, over) => showPatching(enc, target, note, site, columns, step, over));
}

const NO_ANSWER = "So the donor has no answer that could come back: exchange the prompts, or choose another target";

function showPatching(enc, target, note, site, columns, { clean, corrupt, values, tops }, over) {
  if (!values.some(Boolean)) return finish("patching", [STOPPED]);
  const said = make("p", { class: "said" });
  const p = (value) => percent(Math.exp(corrupt + value * (clean - corrupt)));
  const rows = values.map((_, layer) => site === "resid" ? stateName(layer) : partName(layer, site));
  const c = Math.max(0, columns.findIndex(({ same }) => !same)), r = values.reduce((best, row, layer) =>
    row && (values[best]?.[c] ?? -Infinity) < row[c] ? layer : best, -1);  // the largest effect where the prompts differ
  const table = heatMap({
    at: [r, c],
    caption: "Share of the donor's answer that one state restores, by layer and position",
    axis: site === "resid" ? "residual stream" : "output of",
    rows,
    columns,
    cell(r, c) {
      if (!values[r]) return NOTHING;
      const value = values[r][c];
      return { text: signed(value, ""), share: value, says: `${rows[r]}, ${columns[c].says}: effect ` +
        `${value.toFixed(2)}, ${heard(enc, target)} ${p(value)}, most probable ${heard(enc, tops[r][c])}` };
    },
    onlook(r, c) {
      if (!values[r]) return said.replaceChildren(NOTHING.says);
      const name = rows[r][0].toUpperCase() + rows[r].slice(1);
      said.replaceChildren(`${name}, position ${columns[c].at}: `, token(enc, target), ` goes from ${p(0)} to ` +
        `${p(values[r][c])} (after the donor: ${p(1)}); the most probable token is then `, token(enc, tops[r][c]));
    },
  });
  const figure = [said, scrolled(table), key("−1: away from the donor's answer", "1: the donor's answer", true)];
  if (!over) return showFigure("patching", figure);
  finish("patching", [token(enc, target), ` has a probability of ${p(1)} after the donor and ${p(0)} after the recipient. `,
    ...(clean > corrupt ? mostOf(values, columns, site) : [NO_ANSWER]), `.${note}${untilNow(values, rows)}`], ...figure);
}

/** A column of the table: a position, with the donor's token and the recipient's. */
function placeOf(enc, given, had, at) {
  if (given === had) return { text: seen(enc, had), says: `position ${at}, ${heard(enc, had)}`, at, same: true };
  return { text: `${seen(enc, given)}→${seen(enc, had)}`, at, same: false,
    says: `position ${at}, ${heard(enc, given)} in place of ${heard(enc, had)}` };
}

/** A sentence about the state with the largest effect; and, if that is where the prompts differ, about the one of
 *  all other positions. */
function mostOf(values, columns, site) {
  const cells = values.flatMap((row, r) => (row ?? []).map((value, c) => ({ r, c, value }))).sort((a, b) => b.value - a.value);
  const nameOf = (r) => site === "resid" ? stateOf(r) : `the output of ${partName(r, site)}`;
  const words = ({ r, c, value }) => [`${nameOf(r)} at `, make("code", {}, columns[c].text), ` (${signed(value, "")})`];
  const moved = cells.find(({ c }) => columns[c].same), [best] = cells, most = ["The largest effect is that of ", ...words(best)];
  if (!moved || columns[best.c].same) return most;
  return [...most, "; among tokens that both prompts share, that of ", ...words(moved)];
}

// ---- setting up -----------------------------------------------------------------------------------------------------

export function setUpLooking() {
  document.addEventListener("panel", ({ detail: name }) => choosePanel(name));
  document.addEventListener("colours", drawAgain);
  addEventListener("resize", drawAgain);
  $("subject").addEventListener("submit", (event) => {
    event.preventDefault();
    look();
  });
  for (const id of ["colour", "tuned", "how", "site"]) $(id).addEventListener("change", look);
  for (const id of ["look-prompt", "recipient"]) {
    $(id).addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      look();
    });
  }
  $("take-text").addEventListener("click", () => {
    $("look-prompt").value = textSoFar();
    $("look-prompt").dispatchEvent(new Event("input", { bubbles: true }));
    look();
  });
  onModel(() => {  // the figures are those of the previous model
    serial += 1;
    for (const name of Object.keys(running)) {
      running[name].abort(new Stopped());
      delete running[name];
    }
    forgetMaps();
    $("tuned-field").hidden = true;
    Object.keys(PANELS).forEach((name) => finish(name, []));
  });
  choosePanel("lens");
}
