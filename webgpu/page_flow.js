// The flow panel: how the prediction after one token of the prompt is computed. Tokens stand at the bottom, the layers with
// their heads and MLPs above them, the most probable next tokens at the top.

import { flow } from "./flow.js";
import { $, finish, heard, make, partName, percent, queueWith, resultOf, seen, stateName, token } from "./page_common.js";
import { bars, roving, svg } from "./page_draw.js";

const STRONG = 0.05, MOST = 4;  // the attention weights that are drawn: the least, and how many a head
const HEAD = 30, READ = 150, LAYER = 62, TOP = 58;  // pixels: of a head, what the lens reads, a layer's name, above the last state

let redraw = () => {};
addEventListener("resize", () => redraw());

export async function runFlow(model, ids) {
  const found = await queueWith(model, () => flow(model, ids)), { n_layer, n_head } = model.config;
  const view = { model, ids, ...found, L: n_layer, H: n_head, T: ids.length, at: ids.length - 1, cells: [],
    top: make("ol", { class: "bars" }), picture: make("div", { class: "flow", role: "group", "aria-label":
      "The parts of the computation. Arrow keys move to other parts; Up leads to the next layer." }),
    said: make("div", { class: "flow-said", role: "status" }) };
  view.here = [0, view.at];
  view.move = roving(view.picture, view.cells, (r, c) => {
    view.here = [r, c];
    if (r === 0 && c !== view.at) show(view, c);
    else say(view, r, c);
  }, { hover: false });
  view.picture.addEventListener("pointerover", ({ target }) => light(view, target.closest("[data-r]")));
  view.picture.addEventListener("pointerleave", () => light(view, null));
  const scroll = make("div", { class: "scroll" }, view.picture);
  finish("flow", [], make("div", { class: "flow-top" }, legend(), make("div", {}, make("h3", {}, "Next token"), view.top)), scroll, view.said);
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

/** Compute all places, in pixels, and draw. Rows of cells: the tokens, the embedding, then each layer's heads, MLP and state. */
function draw(view) {
  const { model, ids, picture, cells, L, H, T, at } = view, lanes = Math.max(14, Math.min(26, 2.4 * H)), row = L > 12 ? 64 : 50 + lanes;
  const labels = ids.map((id) => seen(model.enc, id).slice(0, 14)), longest = 8 * Math.max(...labels.map(({ length }) => length)) + 10;
  view.width = $("flow").clientWidth;
  const right = LAYER + HEAD * H + READ + 80, width = Math.min(72, Math.max(20, (view.width - right) / T)), flat = longest <= width;
  const heads = T * width + LAYER, stream = heads + HEAD * H + 14, last = TOP + L * row;
  const place = { row, lanes, width, flat, stream, mlp: stream + 22, read: stream + 66, x: (t) => (t + 0.5) * width,
    head: (h) => heads + HEAD * (h + 0.5), y: (state) => TOP + (L - state) * row, tokens: last + 36 };
  Object.assign(picture.style, { width: `${place.read + READ}px`, height: `${place.tokens + (flat ? 30 : Math.min(112, longest))}px` });
  const { embedding, heads: all, mlp } = view;
  view.largest = Math.max(1e-9, ...[embedding, ...mlp, ...all.flat()].map(({ share }) => Math.abs(share[at])));
  const cell = (r, c, kind, [left, top], says, ...content) => {
    (cells[r] ??= [])[c] = make("button", { type: "button", class: kind, "data-r": r, "data-c": c, tabindex: -1, "aria-label": says,
      title: says, style: `left:${left}px;top:${top}px` }, ...content);
  };
  cells.length = 0;
  ids.forEach((_, t) => cell(0, t, `word ${flat ? "flat" : ""} ${t === at ? "at" : t > at ? "later" : ""}`,
    [t * width, place.tokens], tokenInWords(view, t), labels[t]));
  for (let state = 0; state <= L; state++) {
    cell(state + 1, state ? H + 1 : 0, "read", [place.read, place.y(state) - 13], stateInWords(view, state), ...readOf(view, state));
  }
  for (let layer = 0; layer < L; layer++) {
    const y = place.y(layer);
    for (let h = 0; h < H; h++) cell(layer + 2, h, "part", [place.head(h) - 13, y - lanes - 30], partInWords(view, layer, h), square(view, layer, h));
    cell(layer + 2, H, "part", [place.mlp, y - (model.config.parallel ? lanes + 30 : row - 6)], partInWords(view, layer, H), square(view, layer, H));
  }
  const word = (text, left, top, kind = "") => make("span", { class: `mark ${kind}`, style: `left:${left}px;top:${top}px` }, text);
  const marks = [word(H > 1 ? "heads" : "head", place.head(0) - 56, 24, "end"), word("MLP", place.mlp - 2, 24), word("the lens reads", place.read + 8, 24),
    word("final norm, unembedding", stream + 10, 0)];
  for (let h = 0; h < H; h++) marks.push(word(h, place.head(h) - 13, 24, "number"));
  for (let layer = 0; layer < L; layer++) marks.push(word(`layer ${layer}`, place.head(0) - 72, place.y(layer) - lanes - 27));
  picture.style.setProperty("--word", `${width}px`);
  view.top.parentElement.parentElement.style.setProperty("--stream", `${stream - 120}px`);
  picture.replaceChildren(lines(view, place), ...marks, ...cells.flat());
  summarize(view);
}

/** The lines behind the parts: of attention, from the tokens to the heads, and of the stream. */
function lines({ model, picture, maps, L, H, T, at }, { row, lanes, x, y, head, stream, mlp, tokens }) {
  const drawn = svg("svg", { "aria-hidden": "true", width: picture.style.width, height: picture.style.height });
  const path = (kind, d, more = {}) => drawn.append(svg("path", { class: kind, d, ...more }));
  for (let t = 0; t <= at; t++) path("token", `M${x(t)} ${tokens}V${y(L - 1)}`);
  path("stream", `M${x(at)} ${tokens}V${y(0) + 16}H${stream}V2M${stream - 4} 8L${stream} 2L${stream + 4} 8`);
  for (let layer = 0; layer < L; layer++) {
    const base = y(layer), m = base - (model.config.parallel ? lanes + 17 : row - 19);
    path("joins", `M${head(0)} ${base - lanes - 36}H${stream}`);
    for (let h = 0; h < H; h++) path("joins", `M${head(h)} ${base - lanes - 17}V${base - lanes - 36}`);
    path("joins", `M${stream} ${m + 6}H${mlp + 13}`);
    path("joins", `M${mlp + 13} ${m - 6}H${stream}`);
    for (let h = 0; h < H; h++) {
      const lane = base - 2 - (lanes - 2) * (H - 1 - h) / H;  // lines of later heads pass below those of earlier ones
      for (const [t, weight] of strongest(maps[layer], h, T, at)) {
        path("attends", `M${x(t) - 0.01} ${lane}h.01H${head(h) - 8}Q${head(h)} ${lane} ${head(h)} ${base - lanes - 4}`,
          { "data-of": `${layer + 2} ${h}`, "data-from": t, style: `stroke-width:${(0.5 + 5 * weight).toFixed(2)};--s:${weight.toFixed(3)}` });
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
  const row = Array.from(map.subarray((h * T + at) * T, (h * T + at) * T + at + 1), (weight, t) => [t, weight]);
  return row.filter(([, weight]) => weight >= STRONG).sort((a, b) => b[1] - a[1]).slice(0, MOST);
}

/** A part's square: its area is the norm of the vector that the part adds, as a share of the stream's norm; its
 *  colour is the direct contribution. */
function square(view, layer, c) {
  const { norm, share } = partOf(view, layer, c), { at, norms, largest } = view, size = Math.abs(share[at]) / largest;
  return make("i", { class: share[at] < 0 ? "down" : null, "--s": size.toFixed(3), "--n": Math.min(1, norm[at] / norms[layer + 1][at]) ** 0.5 });
}

const partOf = ({ heads, mlp, H }, layer, c) => c < H ? heads[layer][c] : mlp[layer];

function readOf({ model, rows, at }, state) {
  const { ids: [best], p: [p] } = rows[state][at];
  return [make("span", {}, seen(model.enc, best)), make("small", {}, percent(p))];
}

/** Show strongly the lines of a part, or those from a token; none: all lines alike. */
function light({ picture, at }, node) {
  const { r, c } = node?.dataset ?? {}, all = [...picture.querySelectorAll(".attends")];
  const lit = all.filter(({ dataset: { of, from } }) => of === `${r} ${c}` || (r === "0" && from === c && Number(c) <= at));
  picture.classList.toggle("looking", lit.length > 0);
  all.forEach((path) => path.classList.toggle("lit", lit.includes(path)));
}

// ---- in words -------------------------------------------------------------------------------------------------------

const signed = (x) => Math.abs(x) < 0.005 ? "0" : `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(2)}`;
const sized = (x) => x < 1000 ? x.toPrecision(3) : Math.round(x).toLocaleString("en");
const bestOf = ({ rows, L, at }) => rows[L][at].ids[0];
const nameOf = ({ H }, layer, c) => partName(layer, c < H ? `head ${c}` : "mlp");

function tokenInWords({ model, ids, at }, t, name = heard) {
  const role = t > at ? ": it comes later, and no part reads it" : t === at ? ": the picture shows the computation after this token" : "";
  return `token ${t}, ${name(model.enc, ids[t])}${role}`;
}

function stateInWords({ model, rows, norms, embedding, at }, state, name = heard) {
  const { ids: [best], p: [p] } = rows[state][at];
  return `${stateName(state)}: the lens reads ${name(model.enc, best)} with ${percent(p)}; the stream's norm is ${sized(norms[state][at])}` +
    (state ? "" : `; the embedding's direct contribution to the logit is ${signed(embedding.share[at])}`);
}

function partInWords(view, layer, c, name = heard) {
  const { model, ids, maps, norms, H, T, at } = view, { norm, share } = partOf(view, layer, c);
  const read = c < H ? strongest(maps[layer], c, T, at).map(([t, weight]) => `token ${t}, ${name(model.enc, ids[t])}, with ${percent(weight)}`) : [];
  return `${nameOf(view, layer, c)}: ${share[at] < 0 ? "lowers" : "raises"} the logit of ${name(model.enc, bestOf(view))} directly by ` +
    `${Math.abs(share[at]).toFixed(2)}; adds a vector of norm ${sized(norm[at])} (after the layer, the stream's norm is ${sized(norms[layer + 1][at])})` +
    (read.length ? `; reads ${read.join("; ")}` : "");
}

/** The sentence about the sum, and the bars. */
function summarize(view) {
  const { model, ids, rows, L, H, at, embedding, heads, mlp, logit, rest, top } = view, { enc } = model, best = rows[L][at];
  const sum = (parts) => parts.reduce((total, { share }) => total + share[at], 0);
  const first = Array.from({ length: L }, (_, layer) => Array.from({ length: H + 1 }, (_, c) => [layer, c])).flat()
    .reduce((a, b) => partOf(view, ...b).share[at] > partOf(view, ...a).share[at] ? b : a);
  const bounded = model.config.softcap ? " before it is bounded" : "";
  resultOf("flow").replaceChildren("After ", token(enc, ids[at]), " the model predicts ", token(enc, best.ids[0]), ` (${percent(best.p[0])}). ` +
    `This token's logit${bounded}, ${logit[at].toFixed(2)}, is a sum: embedding ${signed(embedding.share[at])}, all heads ` +
    `${signed(sum(heads.flat()))}, all MLPs ${signed(sum(mlp))}${Math.abs(rest[at]) < 0.005 ? "" : `, biases ${signed(rest[at])}`}. The largest addend is that of ` +
    `${nameOf(view, ...first)}: ${signed(partOf(view, ...first).share[at])}.`);
  bars(top, enc, best.ids.map((id, i) => ({ id, p: best.p[i] })));
}

function legend() {
  const line = (weight) => make("i", { class: "line", style: `height:${0.5 + 5 * weight}px`, "aria-hidden": "true" });
  const part = (n, s, down) => make("i", { class: `square ${down ? "down" : ""}`, "--n": n, "--s": s, "aria-hidden": "true" });
  const about = "The direct contribution of a part to a logit is the vector that it adds to the stream, multiplied by the factor of the final norm, " +
    "times the token's row of the unembedding matrix. The factor is that of the whole stream, with all parts: so the contributions of all parts, " +
    "and those of biases, sum to the logit. What later layers make of a vector is not in it; the Ablation panel shows the whole effect of a part.";
  return make("div", { class: "flow-key" },
    make("p", {}, line(0.1), line(0.8), "A line leads from a token to a head that reads it: the thicker it is, the larger the attention weight."),
    make("p", {}, part(0.3, 0), part(0.95, 0), "A square is a head or an MLP: the larger it is, the longer the vector that it adds to the residual stream."),
    make("p", {}, part(0.8, 0.9), part(0.8, 0.9, true), "A red square raises the predicted token's logit directly, a blue one lowers it."),
    make("details", {}, make("summary", {}, "What is a direct contribution?"), make("p", {}, about)));
}

// ---- the part that is looked at, and the other panels ------------------------------------------------------------------

/** Describe the cell, with buttons that lead to the other panels. */
function say(view, r, c) {
  const { model, ids, H, at, said, cells } = view, layer = r - 2, target = model.enc?.decode([bestOf(view)]), ways = [];
  const isPart = r > 1 && c <= H, name = (enc, id) => `“${seen(enc, id)}”`;
  const words = isPart ? partInWords(view, layer, c, name) : r === 0 ? tokenInWords(view, c, name) : stateInWords(view, r - 1, name);
  const way = (text, ...where) => ways.push(make("button", { type: "button", class: "plain small", onclick: () => visit(...where) }, text));
  if (isPart && c < H) way("Attention: all weights of this head", "attention", {}, layer, c);
  if (isPart && at === ids.length - 1) way("Ablation: the effect of switching it off", "ablation", { target }, layer, c < H ? 3 + c : 1);
  if (r > 0 && !isPart) way("Lens: this state at each token", "lens", {}, r - 1, at);
  if (r === 0) way("Patching: states of this token", "patching", { target }, 0, c);
  said.replaceChildren(make("span", {}, `${words[0].toUpperCase()}${words.slice(1)}.`), ...ways);
  light(view, isPart ? cells[r][c] : null);
}

/** Open another panel, with these values of its fields, and go to a cell of its figure, once that is computed. */
function visit(panel, fields, r, c) {
  for (const [id, value] of Object.entries(fields)) {
    $(id).value = value;
    $(id).dispatchEvent(new Event("input", { bubbles: true }));
  }
  document.dispatchEvent(new CustomEvent("choose", { detail: panel }));
  const whole = $(panel), look = () => {
    const cell = whole.querySelector(`.figure [data-r="${r}"][data-c="${c}"]`);
    if (!cell || whole.querySelector("progress")) return false;
    cell.focus();
    cell.click();
    return true;
  };
  if (!look()) new MutationObserver((_, observer) => look() && observer.disconnect()).observe(whole, { childList: true, subtree: true });
}
