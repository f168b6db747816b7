// The flow panel: how the prediction after one token of the prompt is computed. Tokens stand at the bottom, the layers
// with their heads and MLPs above them, the most probable next tokens at the top.

import { flow } from "./flow.js";
import { $, finish, heard, make, onModel, partName, percent, queueWith, resultOf, seen, stateName, token } from "./page_common.js";
import { bars, roving, svg } from "./page_draw.js";
import { goTo } from "./page_link.js";

const STRONG = 0.05, MOST = 4;  // the attention weights that are drawn: the least, and how many of each head
const [HEAD, NAME, TOP] = [30, 62, 58];  // pixels: a head, a layer's name, the space above

let redraw = () => {};
addEventListener("resize", () => redraw());
document.addEventListener("panel", () => redraw());
onModel(() => { redraw = () => {}; });

export async function runFlow(model, ids, { signal }) {
  const found = await queueWith(model, () => flow(model, ids, signal), signal), { n_layer, n_head } = model.config, last = ids.length - 1;
  const words = "The parts of the computation. Arrow keys move to other parts; Up leads to the next layer.";
  const view = { model, ids, ...found, L: n_layer, H: n_head, T: ids.length, at: last, here: [0, last], cells: [],
    top: make("div", { class: "flow-top" }), next: make("ol", { class: "bars" }),
    picture: make("div", { class: "flow", role: "group", "aria-label": words }),
    said: make("div", { class: "flow-said", role: "status" }) };
  view.move = roving(view.picture, view.cells, (r, c) => {
    view.here = [r, c];
    if (r === 0 && c !== view.at) show(view, c);
    else say(view, r, c);
  }, { hover: false });
  const chosen = () => view.cells[view.here[0]][view.here[1]];
  view.picture.addEventListener("pointerover", ({ target }) => light(view, target.closest("[data-r]") ?? chosen()));
  view.picture.addEventListener("pointerleave", () => light(view, chosen()));
  view.top.append(legend(), make("div", {}, make("h3", {}, "Next token"), view.next));
  const scroll = make("div", { class: "scroll" }, view.picture);
  finish("flow", [], view.top, scroll, view.said);
  redraw = () => { if (view.picture.offsetParent && view.width !== $("flow").clientWidth) show(view); };
  show(view);
  scroll.scrollLeft = scroll.scrollWidth;
}

/** Draw the computation at a position. What has the focus keeps it. */
function show(view, at = view.at) {
  const focused = view.picture.contains(document.activeElement), [r, c] = view.here;
  view.at = at;
  draw(view);
  view.move(r, c);
  if (focused) view.cells[r][c].focus({ preventScroll: true });
}

// ---- the picture ----------------------------------------------------------------------------------------------------

/** Compute all places, in pixels, and draw. Rows of cells: tokens; the embedding, which is above the token at the position;
 *  then for each layer its heads, its MLP and the state after it. */
function draw(view) {
  const { model, ids, picture, cells, L, H, T, at } = view, { parallel } = model.config;
  view.width = $("flow").clientWidth;
  view.largest = Math.max(1e-9, ...allParts(view).map(({ share }) => Math.abs(share[at])));
  const lanes = Math.max(14, Math.min(26, 2.4 * H)), row = L > 12 ? 64 : 50 + lanes, bottom = TOP + L * row;
  const labels = ids.map((id) => seen(model.enc, id).slice(0, 14));
  const longest = 8 * Math.max(...labels.map(({ length }) => length)) + 10;
  const room = view.width < 600 ? 110 : 150;  // for what the lens reads
  const width = Math.min(72, Math.max(20, (view.width - NAME - HEAD * H - room - 80) / T)), flat = longest <= width;
  const first = T * width + NAME, stream = first + HEAD * H + 14;
  const place = { lanes, row, width, stream, mlp: stream + 22, read: stream + 66, tokens: bottom + 36,
    x: (t) => (t + 0.5) * width, head: (h) => first + HEAD * (h + 0.5), y: (state) => TOP + (L - state) * row };
  picture.style.width = `${place.read + room}px`;
  picture.style.height = `${place.tokens + (flat ? 30 : Math.min(112, longest))}px`;
  picture.style.setProperty("--word", `${width}px`);
  picture.style.setProperty("--read", `${room}px`);
  view.top.style.setProperty("--stream", `${stream - 120}px`);

  cells.length = 0;
  const cell = (r, c, kind, [left, top], says, ...content) => {
    const look = { class: kind, style: `left:${left}px;top:${top}px`, title: says, "aria-label": says };
    (cells[r] ??= [])[c] = make("button", { type: "button", "data-r": r, "data-c": c, tabindex: -1, ...look }, ...content);
  };
  for (let t = 0; t < T; t++) {
    const kind = `word ${flat ? "flat" : ""} ${t === at ? "at" : t > at ? "later" : ""}`;
    cell(0, t, kind, [t * width, place.tokens], tokenInWords(view, t), labels[t]);
  }
  const { read, y } = place;
  cell(1, at, "read", [read, y(0) - 13], stateInWords(view, 0), ...readOf(view, 0));
  cells[1].fill(cells[1][at]);
  for (let layer = 0; layer < L; layer++) {
    const r = layer + 2, height = y(layer) - lanes - 30, part = (c) => [partInWords(view, layer, c), square(view, layer, c)];
    for (let h = 0; h < H; h++) cell(r, h, "part", [place.head(h) - 13, height], ...part(h));
    cell(r, H, "part", [place.mlp, parallel ? height : y(layer + 1) + 6], ...part(H));
    cell(r, H + 1, "read", [read, y(layer + 1) - 13], stateInWords(view, layer + 1), ...readOf(view, layer + 1));
  }

  const mark = (text, left, top, kind = "") =>
    make("span", { class: `mark ${kind}`, style: `left:${left}px;top:${top}px` }, text);
  const marks = [mark("final norm, unembedding", stream + 10, 0), mark(H > 1 ? "heads" : "head", place.head(0) - 56, 24, "end"),
    mark("MLP", place.mlp - 2, 24), mark("the lens reads", read + 8, 24)];
  for (let h = 0; h < H; h++) marks.push(mark(h, place.head(h) - 13, 24, "number"));
  for (let layer = 0; layer < L; layer++) marks.push(mark(`layer ${layer}`, first - 57, y(layer) - lanes - 27));
  picture.replaceChildren(lines(view, place), ...marks, ...new Set(cells.flat()));
  summarize(view);
}

/** The lines behind the parts: of attention, from the tokens to the heads, and of the stream. */
function lines({ model, picture, maps, L, H, T, at }, { lanes, x, y, head, stream, mlp, tokens }) {
  const drawn = svg("svg", { "aria-hidden": "true", width: picture.style.width, height: picture.style.height });
  const path = (kind, d, more = {}) => drawn.append(svg("path", { class: kind, d, ...more }));
  for (let t = 0; t <= at; t++) path("token", `M${x(t)} ${tokens}V${y(L - 1)}`);
  path("stream", `M${x(at)} ${tokens}V${y(0) + 16}H${stream}V2M${stream - 4} 8L${stream} 2L${stream + 4} 8`);
  for (let layer = 0; layer < L; layer++) {
    const heads = y(layer) - lanes - 17, middle = model.config.parallel ? heads : y(layer + 1) + 19;  // of the parts' squares
    path("joins", `M${head(0)} ${heads - 19}H${stream}`);
    for (let h = 0; h < H; h++) path("joins", `M${head(h)} ${heads}V${heads - 19}`);
    path("joins", `M${stream} ${middle + 6}H${mlp + 13}M${mlp + 13} ${middle - 6}H${stream}`);
    for (let h = 0; h < H; h++) {
      const lane = y(layer) - 2 - (lanes - 2) * (H - 1 - h) / H;  // lines of later heads pass below those of earlier ones
      for (const [t, weight] of strongest(maps[layer], h, T, at)) {
        path("attends", `M${x(t)} ${lane}H${head(h) - 8}Q${head(h)} ${lane} ${head(h)} ${heads + 13}`,
          { "data-of": `${layer + 2} ${h}`, "data-from": t, style: `stroke-width:${0.5 + 5 * weight};--s:${weight}` });
      }
    }
  }
  for (let state = 0; state <= L; state++) {
    drawn.append(svg("circle", { class: "state", cx: stream, cy: y(state), r: 4.5 }));
    path("reads", `M${stream + 5} ${y(state)}H${mlp + 42}`);
  }
  return drawn;
}

/** The tokens to which head h gives most of its weight at a position: [[t, weight], ...]. */
function strongest(map, h, T, at) {
  const start = (h * T + at) * T, row = Array.from(map.subarray(start, start + at + 1), (weight, t) => [t, weight]);
  return row.filter(([, weight]) => weight >= STRONG).sort((a, b) => b[1] - a[1]).slice(0, MOST);
}

/** A part's square. Its area is the norm of the vector that the part adds, as a share of the stream's norm; its colour is the
 *  direct contribution. */
function square(view, layer, c) {
  const { norm, share } = partOf(view, layer, c), { at, norms, largest } = view;
  return make("i", { class: share[at] < 0 ? "down" : null, "--s": (Math.abs(share[at]) / largest).toFixed(3),
    "--n": Math.sqrt(Math.min(1, norm[at] / norms[layer + 1][at])).toFixed(3) });
}

const partOf = ({ heads, mlp, H }, layer, c) => c < H ? heads[layer][c] : mlp[layer];
const allParts = ({ embedding, heads, mlp }) => [embedding, ...heads.flat(), ...mlp];

function readOf({ model, rows, at }, state) {
  const { ids: [best], p: [p] } = rows[state][at];
  return [make("span", {}, seen(model.enc, best)), make("small", {}, percent(p))];
}

/** Show strongly the lines that end at a head, or those that begin at a token; else all lines alike. */
function light({ picture, at }, { dataset: { r, c } }) {
  const all = [...picture.querySelectorAll(".attends")], fromToken = r === "0" && Number(c) !== at;
  const lit = all.filter(({ dataset: { of, from } }) => of === `${r} ${c}` || (fromToken && from === c));
  picture.classList.toggle("looking", lit.length > 0);
  all.forEach((path) => path.classList.toggle("lit", lit.includes(path)));
}

function legend() {
  const line = (weight) => make("i", { class: "line", style: `height:${0.5 + 5 * weight}px`, "aria-hidden": "true" });
  const part = (n, s, kind = "") => make("i", { class: `square ${kind}`, "--n": n, "--s": s, "aria-hidden": "true" });
  return make("div", { class: "flow-key" },
    make("p", {}, line(0.1), line(0.8), "A line leads from a token to a head that reads it. The thicker it is, the larger the " +
      "attention weight."),
    make("p", {}, part(0.3, 0), part(0.95, 0), "A square is a head or an MLP. The larger it is, the longer the vector that it " +
      "adds, compared with the stream."),
    make("p", {}, part(0.8, 0.9), part(0.8, 0.9, "down"), "A red square raises the predicted token's logit directly, a blue " +
      "one lowers it."),
    make("details", {}, make("summary", {}, "What is a direct contribution?"),
      make("p", {}, "The direct contribution of a part to a token's logit is the vector that the part adds to the stream, " +
        "multiplied by the factor of the final norm, times the token's row of the unembedding matrix. The factor is that of " +
        "the whole stream, with all parts. So the contributions of all parts and of the biases sum to the logit. What later " +
        "layers make of a vector is not in its contribution: the Ablation panel shows the whole effect of a part.")));
}

// ---- in words -------------------------------------------------------------------------------------------------------

const signed = (x) => Math.abs(x) < 0.005 ? "0" : `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(2)}`;
const sized = (x) => x < 1000 ? x.toPrecision(3) : Math.round(x).toLocaleString("en");
const bestOf = ({ rows, L }, t) => rows[L][t].ids[0];
const nameOf = ({ H }, layer, c) => partName(layer, c < H ? `head ${c}` : "mlp");

// name(enc, id) is the way in which tokens are named: as text, or for a screen reader.

function tokenInWords({ model, ids, at }, t, name = heard) {
  const role = t > at ? ": it comes later, and no part reads it" : t === at ? ": the picture shows what is computed after it" : "";
  return `token ${t}, ${name(model.enc, ids[t])}${role}`;
}

function stateInWords({ model, rows, norms, embedding, at }, state, name = heard) {
  const { ids: [best], p: [p] } = rows[state][at];
  const more = state ? "" : `; the embedding's direct contribution to the logit is ${signed(embedding.share[at])}`;
  return `${stateName(state)}: the lens reads ${name(model.enc, best)} with ${percent(p)}; the stream's norm is ` +
    `${sized(norms[state][at])}${more}`;
}

function partInWords(view, layer, c, name = heard) {
  const { model: { enc }, ids, maps, norms, H, T, at } = view, { norm, share } = partOf(view, layer, c);
  const read = (c < H ? strongest(maps[layer], c, T, at) : [])
    .map(([t, weight]) => `token ${t}, ${name(enc, ids[t])}, with ${percent(weight)}`);
  return `${nameOf(view, layer, c)}: ${share[at] < 0 ? "lowers" : "raises"} the logit of ${name(enc, bestOf(view, at))} directly by ` +
    `${Math.abs(share[at]).toFixed(2)}; adds a vector of norm ${sized(norm[at])} (after the layer, the stream's norm is ` +
    `${sized(norms[layer + 1][at])})` + (read.length ? `; reads ${read.join("; ")}` : "");
}

/** Show the sentence about the sum, and the bars. */
function summarize(view) {
  const { model: { enc, config }, ids, rows, L, H, at, embedding, heads, mlp, logit, rest } = view;
  const { ids: best, p } = rows[L][at];
  const sum = (parts) => parts.reduce((total, { share }) => total + share[at], 0);
  const biases = Math.abs(rest[at]) < 0.005 ? "" : `, biases ${signed(rest[at])}`;
  const places = heads.flatMap((_, layer) => Array.from({ length: H + 1 }, (_, c) => [layer, c]));
  const shareOf = (where) => partOf(view, ...where).share[at], most = places.reduce((a, b) => shareOf(b) > shareOf(a) ? b : a);
  resultOf("flow").replaceChildren("After ", token(enc, ids[at]), " the model predicts ", token(enc, best[0]), ` (${percent(p[0])}). ` +
    `This token's logit${config.softcap ? " before it is bounded" : ""}, ${logit[at].toFixed(2)}, is a sum: embedding ` +
    `${signed(embedding.share[at])}, all heads ${signed(sum(heads.flat()))}, all MLPs ${signed(sum(mlp))}${biases}. ` +
    `The largest contribution of a part is that of ${nameOf(view, ...most)}: ${signed(shareOf(most))}.`);
  bars(view.next, enc, best.map((id, i) => ({ id, p: p[i] })));
}

// ---- the part that is chosen, and the other panels ------------------------------------------------------------------

/** Describe the cell, with buttons that lead to its cell in other panels. */
function say(view, r, c) {
  const { model, H, T, at, said, cells } = view, layer = r - 2, name = (enc, id) => `“${seen(enc, id)}”`, ways = [];
  const way = (text, ...where) =>
    ways.push(make("button", { type: "button", class: "plain small", onclick: () => visit(...where) }, text));
  const fields = targetOf(model.enc, bestOf(view, T - 1));  // Ablation and Patching are about what follows the whole prompt
  let words;
  if (r === 0) {
    words = tokenInWords(view, c, name);
    way("Patching: states of this token", "patching", fields, 0, c);
  } else if (r === 1 || c > H) {
    words = stateInWords(view, r - 1, name);
    way("Lens: this state at each token", "lens", {}, r - 1, at);
  } else {
    words = partInWords(view, layer, c, name);
    if (c < H) way("Attention: all weights of this head", "attention", {}, layer, c);
    if (at === T - 1) way("Ablation: the effect of switching it off", "ablation", fields, layer, c < H ? 3 + c : 1);
  }
  said.replaceChildren(make("span", {}, `${words[0].toUpperCase()}${words.slice(1)}.`), ...ways);
  light(view, cells[r][c]);
}

/** The field of a token as a target; none if the token cannot be typed, such as the end of a line: the panel that is opened then
 *  keeps the target that it has, and names it. */
function targetOf(enc, id) {
  const target = enc.decode([id]);
  return enc.encode(target)[0] === id && !/[\r\n]/.test(target) ? { target } : {};
}

/** Open another panel, with these values of its fields, and go to a cell of its figure, once that is computed. */
function visit(panel, fields, r, c) {
  goTo({ panel, fields });
  const whole = $(panel), arrived = () => {
    if (whole.querySelector("progress")) return false;
    const cell = whole.querySelector(`.figure [data-r="${r}"][data-c="${c}"]`);  // none if the panel has a message instead
    (cell ?? $(`tab-${panel}`)).focus();
    cell?.click();
    return true;
  };
  const observer = new MutationObserver(() => arrived() && observer.disconnect());
  if (!arrived()) observer.observe(whole, { childList: true, subtree: true });
}
