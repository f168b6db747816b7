// Bars, heat maps and the loss chart. All can be used with the keyboard, and describe in words what they show.

import { heard, make, percent, piece, seen } from "./page_common.js";

// ---- bars -----------------------------------------------------------------------------------------------------------

/** Show rows of {id, p, taken?, words?, drawn?, cut?} in a list. Existing elements are kept, so that the focus stays where it
 *  is. act(id) is called when a row is pressed. words: instead of p; drawn: a second probability, with a bar of its own; cut: why
 *  the token cannot be drawn. */
export function bars(list, enc, rows, act = null) {
  while (list.children.length > rows.length) list.lastChild.remove();
  while (list.children.length < rows.length) {
    list.append(make("li", {}, act ? make("button", { type: "button" }) : make("div")));
  }
  rows.forEach(({ id, p, taken, words, drawn, cut }, i) => {
    const row = list.children[i].firstChild, share = words ?? percent(p), second = cut ? "cut off" : drawn === undefined ? "" : percent(drawn);
    list.children[i].classList.toggle("taken", Boolean(taken));
    list.children[i].classList.toggle("cut", Boolean(cut));
    row.replaceChildren(piece(enc, id), make("span", { class: "both" }, make("i", { "--p": p }), second && make("i", { class: "drawn", "--p": drawn })),
      make("span", { class: "share" }, share), second && make("span", { class: "share drawn" }, second));
    if (!act) return;
    row.onclick = () => act(id);
    const chance = cut ? `, cut off by ${cut}` : second && `, drawn with ${second}`;
    row.setAttribute("aria-label", `${heard(enc, id)}, ${share}${chance}${taken ? ", written" : ", take this one"}`);
  });
}

// ---- heat maps ------------------------------------------------------------------------------------------------------

/** A table of the cells {text, share, says} that cell(row, column) returns; share, from -1 to 1, is the colour. Arrow keys
 *  move from cell to cell; onlook(row, column) is called for the cell that is looked at. axis: what the rows are; rows:
 *  labels, row 0 at the bottom; columns: {text, says, place}, where place stands above the text; at: the [row, column] that
 *  is looked at first, which a figure is scrolled to. */
export function heatMap({ caption, axis, rows, columns, cell, onlook, at = [rows.length - 1, columns.length - 1] }) {
  const table = make("table", { class: "heat", role: "grid", "aria-label": caption });
  const head = make("tr", {}, make("th", { scope: "col" }, axis));
  const above = (place) => place === undefined ? [] : [make("small", {}, place), make("br")];
  head.append(...columns.map(({ text, says, place }) =>
    make("th", { scope: "col", title: says, "aria-label": says }, ...above(place), text)));
  const body = make("tbody"), cells = [];
  rows.forEach((label, r) => {
    const line = make("tr", {}, make("th", { scope: "row" }, label));
    cells[r] = columns.map((column, c) => {
      const { text, share, says } = cell(r, c), size = Math.min(1, Math.abs(share) || 0);
      return make("td", { role: "gridcell", tabindex: -1, "aria-label": says, "--s": size.toFixed(3),
        class: `${strength(size)} ${share < 0 ? "down" : ""}`, "data-r": r, "data-c": c }, text);
    });
    line.append(...cells[r]);
    body.prepend(line);
  });
  table.append(make("thead", {}, head), body);
  roving(table, cells, onlook)(...at);
  return table;
}

/** The class of a background by the strength of its colour, 0 to 1: on strong colours the text needs another colour. */
export const strength = (share) => share > 0.85 ? "strong" : share > 0.6 ? "half" : "";

/** Make cells[row][column] one stop of the Tab key; arrow keys, Home and End move between the cells, whose rows may have several
 *  lengths. hover: whether a mouse that points at a cell looks at it. Returns a function that moves to a row and column. */
export function roving(container, cells, onlook, { hover = true } = {}) {
  let here = null;
  const look = (node) => {
    const [r, c] = [Number(node.dataset.r), Number(node.dataset.c)];
    here?.classList.remove("here");
    here?.setAttribute("tabindex", -1);
    here = node;
    here.classList.add("here");
    here.setAttribute("tabindex", 0);
    onlook(r, c);
  };
  const of = (event) => event.target.closest("[data-r]");
  container.addEventListener("pointerover", (event) => hover && event.pointerType === "mouse" && of(event) && look(of(event)));
  container.addEventListener("focusin", (event) => of(event) && look(of(event)));
  container.addEventListener("click", (event) => of(event)?.focus({ preventScroll: true }));
  container.addEventListener("keydown", (event) => {
    const node = of(event);
    if (!node) return;
    const [r, c] = [Number(node.dataset.r), Number(node.dataset.c)], last = cells[r].length - 1;
    const to = { ArrowUp: [r + 1, c], ArrowDown: [r - 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1],
      Home: [r, 0], End: [r, last] }[event.key];
    const row = cells[to?.[0]], next = row?.[Math.min(to[1], row.length - 1)];
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  return (r, c) => look(cells[r][c]);
}

/** The legend of a heat map's colours, from one text to another. both: the colours of negative values are shown too. */
export function key(from, to, both = false) {
  const colours = make("i", { class: both ? "both" : null, "aria-hidden": "true" });
  return make("p", { class: "key" }, make("span", {}, from, colours, to));
}

// ---- attention ------------------------------------------------------------------------------------------------------

const LABELS = 0.2;  // of a part's height, for the tokens of its columns

/** Draw T x T attention weights on a canvas, in its text colour: queries in rows, keys in columns. at: [row, column] to be
 *  marked. part: [row, column, n], the n x n cells to draw from there on; null: all. labels: of all rows, drawn in the empty
 *  half, right of the diagonal; of a part, right of it and below. Returns the side of a cell, in CSS pixels. */
export function drawMap(canvas, weights, T, { at = null, labels = null, part = null } = {}) {
  const scale = globalThis.devicePixelRatio || 1, height = Math.round(canvas.clientHeight * scale) || T;
  const [row, column, n] = part ?? [0, 0, T], size = Math.round(height * (part ? 1 - LABELS : 1)), side = size / n;
  [canvas.width, canvas.height] = [Math.round(canvas.clientWidth * scale) || T, height];
  const pen = canvas.getContext("2d"), ink = getComputedStyle(canvas.parentElement).color;
  const image = pen.createImageData(size, size);
  const cells = (pixel) => [Math.floor(pixel / side), Math.max(Math.floor(pixel / side) + 1, Math.floor((pixel + 1) / side))];
  for (let y = 0; y < size; y++) {
    const [above, below] = cells(y);
    for (let x = 0; x < size; x++) {
      const [first, last] = cells(x);
      let most = 0;  // of the cells in this pixel
      for (let i = row + above; i < row + below; i++) {
        for (let j = column + first; j < Math.min(column + last, i + 1); j++) most = Math.max(most, weights[i * T + j]);
      }
      image.data[4 * (y * size + x) + 3] = 255 * Math.sqrt(most);  // so that small weights can be seen
    }
  }
  pen.putImageData(image, 0, 0);
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = getComputedStyle(canvas).color;
  pen.fillRect(0, 0, size, size);
  pen.globalCompositeOperation = "source-over";
  pen.strokeStyle = pen.fillStyle = ink;
  pen.lineWidth = scale;
  if (at) {
    const [i, j] = [at[0] - row, at[1] - column];
    pen.strokeRect(j * side, i * side, side, side);
    pen.globalAlpha = 0.4;
    pen.strokeRect(0, i * side, (part ? n : i + 1) * side, side);
  }
  if (!labels || side < 11 * scale) return side / scale;
  pen.font = `${Math.min(13 * scale, 0.8 * side)}px ui-monospace, Menlo, Consolas, monospace`;
  pen.textBaseline = "middle";
  for (let i = 0; i < n; i++) {
    pen.globalAlpha = !at || row + i === at[0] || !part && i === at[1] ? 1 : 0.6;
    pen.fillText(labels[row + i].slice(0, 16), (part ? n : i + 1) * side + 5 * scale, (i + 0.5) * side);
    if (!part) continue;
    pen.globalAlpha = !at || column + i === at[1] ? 1 : 0.6;
    pen.save();
    pen.translate((i + 0.5) * side, size + 5 * scale);
    pen.rotate(Math.PI / 2);
    pen.fillText(labels[column + i].slice(0, 16), 0, 0);
    pen.restore();
  }
  return side / scale;
}

// ---- the loss -------------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** The chart of losses, in nats a token, and its legend: nodes. train: [[update, loss], ...]; held: likewise, of the text held
 *  out; until: the last update; W: the width in pixels. Before the first loss it has no numbers. */
export function lossChart({ train, held, until, W = 560 }) {
  const [H, left, right, top, bottom] = [270, 34, 66, 26, 24], [ground, end] = [H - bottom, W - right];
  const text = (x, y, words, more = {}) => svg("text", { x, y, ...more }, words);
  const { line, width } = smooth(train);
  const chart = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": lossInWords(line, width, held) });
  chart.append(text(0, 12, "loss, nats per token"), text((left + end) / 2, H - 4, "update", { "text-anchor": "middle" }));
  if (!train.length && !held.length) {
    chart.append(svg("path", { class: "grid", fill: "none", d: `M${left} ${top}V${ground}H${end}` }),
      text((left + end) / 2, H / 2, "Here the losses of a run are drawn.", { "text-anchor": "middle" }));
    return [chart];
  }
  const [least, most] = [...train, ...held].reduce(([low, high], [, loss]) => [Math.min(low, loss), Math.max(high, loss)],
    [Infinity, -Infinity]);
  const [low, high, gap] = ticksOf(least, Math.max(most, least + 0.1));
  const x = (step) => left + (end - left) * step / Math.max(1, until);
  const y = (loss) => top + (ground - top) * (high - loss) / (high - low);
  for (let tick = low; tick <= high + 1e-9; tick += gap) {
    chart.append(svg("line", { class: "grid", x1: left, x2: end, y1: y(tick), y2: y(tick) }),
      text(left - 6, y(tick) + 4, String(Number(tick.toFixed(2))), { "text-anchor": "end" }));
  }
  chart.append(text(left, H - 4, "0"), text(end, H - 4, until.toLocaleString("en"), { "text-anchor": "end" }));
  const path = (points, name) => svg("path", { class: name,
    d: points.map(([step, loss], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`).join("") });
  chart.append(path(thin(train), "raw"), path(thin(line), "line"), path(held, "held"));
  chart.append(...held.map(([step, loss]) => svg("circle", { cx: x(step), cy: y(loss), r: 2.5 })));
  const ends = [[line.at(-1), "of-line", "learnt"], [held.at(-1), "of-held", "held out"]].filter(([point]) => point);
  const places = apart(ends.map(([point]) => y(point[1])));
  const last = Math.max(train.at(-1)?.[0] ?? 0, held.at(-1)?.[0] ?? 0);
  ends.forEach(([, name, words], i) => chart.append(text(x(last) + 8, places[i] + 4, words, { class: name })));
  const sample = (name) => svg("svg", { viewBox: "0 0 20 8", "aria-hidden": "true" }, svg("path", { class: name, d: "M0 4H20" }));
  const mean = width > 1 ? `the mean of the ${width} updates around each` : "";
  const legend = [["raw", "learnt: each update"], ["line", mean && `learnt: ${mean}`], ["held", "held out"]];
  return [chart, make("p", { class: "key" }, ...legend.filter(([, words]) => words).map(([name, words]) =>
    make("span", {}, sample(name), words)))];
}

function lossInWords(line, width, held) {
  if (!line.length) return "No update yet";
  const [[first, before], [last, now]] = [line[0], line.at(-1)], mean = width > 1 ? `, as means of ${width} updates` : "";
  return `Loss on the text that is learnt${mean}: ${before.toFixed(2)} at update ${first}, ${now.toFixed(2)} at update ` +
    `${last}.` + (held.length ? ` Held out: ${held.at(-1)[1].toFixed(2)}.` : "");
}

/** The heights of two labels, moved apart if they would overlap. */
function apart(places) {
  if (places.length < 2 || Math.abs(places[0] - places[1]) >= 14) return places;
  const middle = (places[0] + places[1]) / 2;
  return places[0] < places[1] ? [middle - 7, middle + 7] : [middle + 7, middle - 7];
}

/** Round numbers for the ticks of an axis from least to most: [low, high, gap]. */
function ticksOf(least, most) {
  const rough = (most - least) / 4 || 0.1, power = 10 ** Math.floor(Math.log10(rough));
  const gap = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  return [Math.floor(least / gap) * gap, Math.ceil(most / gap) * gap, gap];
}

/** The means of [[update, loss], ...] over a window around each update: {line, width}, without the updates at both ends whose
 *  window is not whole. A mean of earlier updates alone would lag behind: while the loss falls, it would be too high. */
export function smooth(points) {
  const half = Math.floor(points.length / 40), width = 2 * half + 1;  // a twentieth of the run
  let sum = points.slice(0, width - 1).reduce((sum, [, loss]) => sum + loss, 0);
  const line = points.slice(half, points.length - half).map(([step], i) => {
    sum += points[i + width - 1][1];
    const mean = sum / width;
    sum -= points[i][1];
    return [step, mean];
  });
  return { line, width };
}

function thin(points, most = 600) {
  const step = Math.ceil(points.length / most);
  return step < 2 ? points : points.filter((_, i) => i % step === 0 || i === points.length - 1);
}
