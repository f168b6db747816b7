// Save a figure as a PNG with a caption. It is drawn on a canvas from the boxes, texts and lines that the browser shows: a picture
// of HTML within an SVG may not be read in every browser. page.js imports this when it is asked for.

import { UserError } from "./errors.js";
import { $, make, page } from "./page_common.js";

const SCALE = 2, PAD = 24, LEAST = 560;  // pixels of the picture in one of the page's; its margin, and its least width

/** Draw the panel that is open, or the candidates of the next token ("next"), and offer the picture as a file. UserError if there
 *  is no figure yet. */
export async function savePicture(what) {
  const panel = document.querySelector("[role=tab][aria-selected=true]").id.slice(4), name = what === "next" ? "next" : panel;
  const figure = { next: $("next"), train: $("chart"), speed: $("choices").closest("table") }[name] ??
    document.querySelector(`#${panel} .figure`);
  if (!figure.offsetHeight || !figure.children.length) throw new UserError("There is no figure to save yet: compute it first.");
  const blob = await new Promise((resolve) => draw(figure, captionOf(name)).toBlob(resolve, "image/png"));
  const link = make("a", { href: URL.createObjectURL(blob), download: `tinygpt-${name}.png` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** The lines of a caption, {text, font}: the panel and the model, the prompts, and what the panel says of its figure. */
function captionOf(name) {
  const title = name === "next" ? "The next token" : $(`tab-${name}`).textContent;
  const mono = "13px ui-monospace, Menlo, Consolas, monospace";
  const line = (label, text) => ({ text: `${label}: ${text.replaceAll("\n", "↵")}`, font: mono });
  const model = { train: "a model that is trained on this page", speed: $("adapter").textContent }[name] ??
    page.model?.blob.name ?? $("card-name").textContent;
  const lines = [{ text: `${title} · ${model}`, font: "20px Georgia, serif" }];
  const prompts = { next: [], train: [], speed: [], steer: [["prompt", "steer-prompt"]],
    ablation: [["prompt", "look-prompt"], ["target", "target"]],
    patching: [["donor", "look-prompt"], ["recipient", "recipient"], ["target", "target"]] }[name] ?? [["prompt", "look-prompt"]];
  if (name === "next") lines.push(line("text", $("sheet").textContent.slice(-120)));
  lines.push(...prompts.map(([label, id]) => line(label, label === "target" ? `“${$(id).value}”` : $(id).value)));
  const said = name === "next" ? $("scrub-says").textContent : document.querySelector(`#${name} .result`)?.textContent;
  if (said) lines.push({ text: said, font: "13px system-ui, sans-serif" });
  return lines;
}

/** A canvas with a caption and a figure below it. */
export function draw(figure, caption) {
  const all = [figure, ...figure.querySelectorAll("*")];
  const scrolled = all.filter(({ scrollLeft }) => scrollLeft).map((node) => [node, node.scrollLeft]);
  const sticky = all.filter((node) => getComputedStyle(node).position === "sticky");
  scrolled.forEach(([node]) => { node.scrollLeft = 0; });  // so that everything stands at its place
  sticky.forEach((node) => { node.style.position = "static"; });
  const box = figure.getBoundingClientRect(), rects = all.map((node) => node.getBoundingClientRect());
  const width = Math.max(LEAST, ...rects.map(({ right }) => right - box.left));
  const height = Math.max(...rects.map(({ bottom }) => bottom - box.top));
  const canvas = make("canvas"), pen = canvas.getContext("2d"), { backgroundColor, color } = getComputedStyle(document.body);
  const lines = caption.flatMap(({ text, font }) => wrapped(pen, text, font, width).map((part) => ({ part, font })));
  const top = PAD + 24 * lines.length + 12;
  [canvas.width, canvas.height] = [SCALE * (width + 2 * PAD), SCALE * (top + height + PAD)].map(Math.ceil);
  pen.scale(SCALE, SCALE);
  pen.fillStyle = backgroundColor;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = color;
  lines.forEach(({ part, font }, i) => {
    pen.font = font;
    pen.fillText(part, PAD, PAD + 24 * i + 14);
  });
  pen.translate(PAD - box.left, top - box.top);
  paint(pen, figure);
  sticky.forEach((node) => { node.style.position = ""; });
  scrolled.forEach(([node, left]) => { node.scrollLeft = left; });
  return canvas;
}

/** A text in lines of at most this width; a word that is longer has a line of its own. */
function wrapped(pen, text, font, width) {
  pen.font = font;
  const lines = [""];
  for (const word of text.split(/(?<= )/)) {
    if (lines.at(-1) && pen.measureText(lines.at(-1) + word).width > width) lines.push("");
    lines[lines.length - 1] += word;
  }
  return lines;
}

// ---- painting ---------------------------------------------------------------------------------------------------------

/** Paint an element and what is in it, at its place in the window. */
function paint(pen, node) {
  if (node.nodeType === Node.TEXT_NODE) return paintText(pen, node);
  if (node.nodeType !== Node.ELEMENT_NODE) return;
  const style = getComputedStyle(node);
  const folded = node.parentElement.matches("details:not([open])") && node.tagName !== "SUMMARY";
  if (style.display === "none" || style.visibility === "hidden" || folded || node.matches(".unseen, button.plain, .flow-said button")) return;
  pen.save();
  pen.globalAlpha *= Number(style.opacity);
  if (node.tagName === "svg") paintLines(pen, node);
  else {
    paintBox(pen, node, style);
    node.childNodes.forEach((child) => paint(pen, child));
  }
  pen.restore();
}

function paintBox(pen, node, style) {
  const { left, top, width, height } = node.getBoundingClientRect(), edge = parseFloat(style.borderTopWidth);
  const shape = new Path2D();
  shape.roundRect(left, top, width, height, parseFloat(style.borderTopLeftRadius) || 0);
  const colours = style.backgroundImage.match(/(?:rgb|oklab|oklch|color|lab)a?\([^()]*\)/g);
  pen.fillStyle = colours ? gradient(pen, left, left + width, colours) : style.backgroundColor;
  pen.fill(shape);
  if (edge && style.borderTopStyle !== "none") {
    [pen.strokeStyle, pen.lineWidth] = [style.borderTopColor, edge];
    pen.stroke(shape);
  }
  if (style.overflowX === "hidden") pen.clip(shape);
  if (node.tagName === "CANVAS") pen.drawImage(node, left, top, width, height);
}

function gradient(pen, from, to, colours) {
  const found = pen.createLinearGradient(from, 0, to, 0);
  colours.forEach((colour, i) => found.addColorStop(i / (colours.length - 1), colour));
  return found;
}

/** Paint a text, line by line: characters that stand at one height are one line. */
function paintText(pen, node) {
  const text = node.data, range = document.createRange(), lines = [], style = getComputedStyle(node.parentElement);
  if (!text.trim()) return;
  for (let i = 0; i < text.length; i++) {
    range.setStart(node, i);
    range.setEnd(node, i + 1);
    const rect = range.getClientRects()[0];
    if (!rect?.width || !rect.height) continue;
    const line = lines.at(-1);
    if (line && (style.writingMode.startsWith("vertical") || Math.abs(line.rect.top - rect.top) < 2)) line.part += text[i];
    else lines.push({ rect, part: text[i] });
  }
  [pen.font, pen.fillStyle] = [`${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`, style.color];
  for (const { rect, part } of lines) {
    const below = pen.measureText(part).fontBoundingBoxDescent;
    if (!style.writingMode.startsWith("vertical")) {
      pen.fillText(part.replace(/[\n\t]/g, " "), rect.left, rect.bottom - below);
      continue;
    }
    pen.save();  // a text that is read from the bottom to the top
    pen.translate(rect.right - below, rect.bottom);
    pen.rotate(-Math.PI / 2);
    pen.fillText(part, 0, 0);
    pen.restore();
  }
}

/** Paint an SVG's lines, paths, circles, rectangles and texts. */
function paintLines(pen, picture) {
  const number = (node, name) => Number(node.getAttribute(name) ?? 0);
  for (const node of picture.querySelectorAll("line, path, circle, rect, text")) {
    const style = getComputedStyle(node), to = node.getScreenCTM(), shape = new Path2D(node.getAttribute("d") ?? undefined);
    if (style.display === "none") continue;
    if (node.tagName === "line") shape.moveTo(number(node, "x1"), number(node, "y1")), shape.lineTo(number(node, "x2"), number(node, "y2"));
    if (node.tagName === "circle") shape.arc(number(node, "cx"), number(node, "cy"), number(node, "r"), 0, 2 * Math.PI);
    if (node.tagName === "rect") shape.rect(...["x", "y", "width", "height"].map((name) => number(node, name)));
    pen.save();
    pen.transform(to.a, to.b, to.c, to.d, to.e, to.f);
    pen.globalAlpha *= Number(style.opacity);
    [pen.fillStyle, pen.strokeStyle, pen.lineWidth, pen.lineCap, pen.lineJoin] =
      [style.fill, style.stroke, parseFloat(style.strokeWidth), style.strokeLinecap, style.strokeLinejoin];
    pen.setLineDash(style.strokeDasharray === "none" ? [] : style.strokeDasharray.split(/[ ,]+/).map(parseFloat));
    if (node.tagName === "text") {
      pen.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
      pen.textAlign = { middle: "center", end: "end" }[style.textAnchor] ?? "start";
      pen.fillText(node.textContent, number(node, "x"), number(node, "y"));
    } else {
      if (style.fill !== "none") pen.fill(shape);
      if (style.stroke !== "none") pen.stroke(shape);
    }
    pen.restore();
  }
}
