// Shared by the parts of the page, which are page_write.js, page_look.js, page_train.js and page_speed.js: the model that is
// open, a queue for the device, messages of errors, and functions for the document. page.js starts them.

import { Stopped, UserError } from "./errors.js";

const LOST = "The graphics card's device was lost: press Reload the device, at the top.";

/** gpu and model are null until they are loaded. lost: the device was lost, and has not been opened again. why: the message
 *  if there is no device. */
export const page = { gpu: null, model: null, lenses: null, lost: false, why: "" };

// ---- a queue for the device -----------------------------------------------------------------------------------------

// The device does one piece of work at a time. Writing queues each token by itself, training each update, and a panel its
// whole computation: so a panel that the user asks for is computed next, and then writing or training goes on.

let turn = Promise.resolve();
let queued = 0;  // pieces of work that are not done

export function queue(work) {
  queued += 1;
  showDoing();
  const mine = turn.then(work).finally(() => {
    queued -= 1;
    showDoing();
  });
  turn = mine.catch(() => {});
  return mine;
}

/** Queue work() with this model. UserError if another model has been opened before its turn. If the signal is aborted before
 *  its turn, work() does not run; if it is aborted then or meanwhile, the signal's reason is thrown. */
export async function queueWith(model, work, signal) {
  const result = await queue(() => {
    signal?.throwIfAborted();
    if (model !== page.model) throw new UserError("Another model was opened before this was done: try it once more.");
    return work();
  });
  signal?.throwIfAborted();
  return result;
}

const going = new Map();  // activities by name: {words, n}, of which n are going on

/** Show at the top of the page what is going on. "Ready" is shown only while nothing is going on and the queue is empty. */
export function showDoing() {
  const idle = page.lost ? "The device was lost" : page.model ? "Ready" : "No model";
  const text = [...going.values()].map(({ words }) => words).join(" · ") || (queued ? "Working" : idle);
  if ($("doing").textContent !== text) $("doing").textContent = text;
  $("doing").classList.toggle("busy", going.size > 0 || queued > 0);
}

/** Change the words of an activity that is going on. */
export function doing(what, words) {
  going.get(what).words = words;
  showDoing();
}

/** Show these words while work() is going on. Of activities with one name, the last words are shown until all are over. */
export async function during(what, words, work) {
  const n = (going.get(what)?.n ?? 0) + 1;
  going.set(what, { words, n });
  showDoing();
  try {
    return await work();
  } finally {
    const mine = going.get(what);
    mine.n -= 1;
    if (!mine.n) going.delete(what);
    showDoing();
  }
}

// ---- opening a model ------------------------------------------------------------------------------------------------

const asked = [];

export function onModel(tell) { asked.push(tell); }

export function setModel(model) {
  page.model?.destroy();
  Object.assign(page, { model, lenses: null });
  asked.forEach((tell) => tell(model));
}

/** The model that is open. UserError if there is none. */
export function needModel() {
  if (page.lost) throw new UserError(LOST);
  if (!page.gpu) throw new UserError(page.why || "The graphics card is not ready yet: wait a moment.");
  if (!page.model) throw new UserError("No model is open: open a checkpoint, or drop one on this page.");
  return page.model;
}

/** The token ids of a text, after the token that begins a text, if the model has one, as in sample.py and patching.py; or,
 *  asChat, of a message in the model's chat template. */
export function idsOf(model, text, asChat = false) {
  if (!model.enc) throw new UserError("This checkpoint holds no tokenizer: it cannot read or write text.");
  const ids = asChat ? model.promptOf(text) : [...model.enc.start, ...model.enc.encode(text)];
  model.checkPrompt(ids);
  return ids;
}

// ---- errors ---------------------------------------------------------------------------------------------------------

export function wordsOf(error) {
  if (error instanceof UserError) return error.message;
  if (page.lost) return LOST;
  if (error instanceof RangeError && /alloc|array length/i.test(error.message)) {
    return "The browser has not enough memory for this: take a smaller model, a smaller batch or a shorter text.";
  }
  console.error(error);
  return `The page has a bug: ${error?.message ?? error}. You can go on with the model that is open.`;
}

/** Run work(). An error is shown at `place`, the id of an element. True if there was none. asked: a user did something that
 *  begins the work, so that an older message goes; work that begins by itself leaves it there. */
export async function attempt(place, work, { asked = true } = {}) {
  if (asked) say(place, "");
  try {
    await work();
    return true;
  } catch (error) {
    if (error instanceof Stopped) return false;
    if (!(error instanceof UserError)) await lossIsKnown();
    say(place, wordsOf(error));
    return false;
  }
}

/** When a device is lost, work on it may fail a moment before the browser reports the loss: wait for the report. */
export async function lossIsKnown() {
  const moment = new Promise((resolve) => setTimeout(resolve, 1000));
  await Promise.race([moment, page.gpu?.lost]);
  await null;  // so that page.js handles it first
}

export function say(place, words) {
  $(place).textContent = words;
  $(place).hidden = !words;
}

/** Once there is a new device, remove the messages about the lost one. */
export function forgetLoss() {
  for (const { id, textContent } of document.querySelectorAll(".wrong")) if (textContent === LOST) say(id, "");
}

/** The number in an input field; null if the field is empty and may be. UserError if it is not a number in range. */
export function numberOf(id) {
  const input = $(id), name = input.parentElement.textContent.trim(), { min, max } = input;
  if (input.value === "" && input.placeholder && !input.validity.badInput) return null;
  if (!input.checkValidity() || input.value === "") {
    const whole = input.step === "1" ? "a whole number" : "a number";
    const [least, most] = [min, max].map((limit) => Number(limit).toLocaleString("en", { maximumFractionDigits: 9 }));
    throw new UserError(`${name} must be ${whole} from ${least} to ${most}.`);
  }
  return Number(input.value);
}

// ---- the document ---------------------------------------------------------------------------------------------------

export const $ = (id) => document.getElementById(id);

/** A new element. Attributes that begin with "on" are listeners, those with "--" style properties; false and null are left
 *  out. */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** A notice at the top of the page, with buttons {label: action}. Pressing a button removes the notice, and so does its
 *  remove(). */
export function notice(words, buttons, role = "status") {
  const node = make("div", { class: "notice", role }, make("span", {}, words));
  for (const [label, action] of Object.entries(buttons)) {
    node.append(make("button", { type: "button", onclick: () => (node.remove(), action()) }, label));
  }
  $("notices").append(node);
  return node;
}

/** A share as a percentage; what is above 0 is never written as 0%. */
export function percent(p) {
  if (p > 0 && p < 0.00005) return "<0.01%";
  return `${(100 * p).toFixed(p >= 0.0995 || !p ? 0 : p >= 0.00095 ? 1 : 2)}%`;
}

export const count = (n) => Math.round(n).toLocaleString("en");

export function many(n) {
  if (n < 1e6) return count(n);
  return n < 1e9 ? `${(n / 1e6).toFixed(n < 1e7 ? 2 : 0)} million` : `${(n / 1e9).toFixed(2)} billion`;
}

// ---- names of a model's states and parts ------------------------------------------------------------------------------

/** The name of the residual stream's state that layer `index` reads; that of n_layer is what the head reads. Layers count
 *  from 0. */
export const stateName = (index) => index ? `after layer ${index - 1}` : "embedding";

/** The name of a layer's part: attn, mlp, block (the whole layer), or "head 2". */
export function partName(layer, part) {
  if (part === "block") return `all of layer ${layer}`;
  return part.startsWith("head") ? `layer ${layer}, ${part}` : `layer ${layer}'s ${part === "attn" ? "attention" : "MLP"}`;
}

// ---- the figures of panels ------------------------------------------------------------------------------------------

export const resultOf = (name) => document.querySelector(`#${name} .result`);

/** Show a panel's result: words, and nodes for its figure. */
export function finish(name, words, ...figure) {
  resultOf(name).replaceChildren(...words);
  showFigure(name, figure);
}

/** Show the nodes of a panel's figure, scrolled to the cell that is looked at. */
export function showFigure(name, figure) {
  document.querySelector(`#${name} .figure`).replaceChildren(...figure);
  for (const part of figure) {
    const here = part.querySelector(".here");
    if (here) part.scrollLeft = here.offsetLeft - part.clientWidth / 2;
  }
}

// ---- tokens, as text and for screen readers -------------------------------------------------------------------------

const hex = (n) => `<${n.toString(16).toUpperCase().padStart(2, "0")}>`;

/** A token as visible text: a dot for each blank, an arrow for the end of a line; bytes that are not text as <C3>. */
export function seen(enc, id) {
  if (!enc) return String(id);
  if (id === enc.bos || id === enc.eot) return "⟨text⟩";
  const text = enc.decode([id]);
  if (text.includes("\ufffd") || !text) return [...enc.pieces[id] ?? []].map(hex).join("") || "⟨none⟩";
  return text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥")
    .replace(/[\p{Cc}\p{Cf}]/gu, (character) => hex(character.codePointAt(0)));
}

/** A token in words, for a screen reader, which does not read dots. */
export function heard(enc, id) {
  if (!enc || id === enc.bos || id === enc.eot) return enc ? "begin of text" : `token ${id}`;
  return seen(enc, id).replace(/·+/g, (dots) => dots.length > 1 ? ` ${dots.length} blanks ` : " blank ")
    .replaceAll("↵", " new line ").replaceAll("⇥", " tab ").trim();
}

export const token = (enc, id) => make("code", {}, seen(enc, id));

export function piece(enc, id) {
  const node = make("span", { class: "piece" });
  for (const part of seen(enc, id).split(/([·↵⇥]+)/)) {
    if (part) node.append(/^[·↵⇥]/.test(part) ? make("span", { class: "dim" }, part) : part);
  }
  return node;
}
