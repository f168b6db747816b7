// What the parts of the page share: the model that is open, whose turn it is on the device, words for errors, and a few
// helpers for the document. page.js begins; page_write.js, page_look.js, page_train.js and page_speed.js are its parts.

import { UserError } from "./errors.js";

const LOST = "The graphics card's device was lost: press Reload the device, at the top.";

/** gpu and model are null until they are there; lost says that the device went away, and has not been opened again. */
export const page = { gpu: null, model: null, lenses: null, lost: false, why: "" };

// ---- turns ----------------------------------------------------------------------------------------------------------

// One thing at a time: writing takes a turn for each token, training for each update, a panel for all that it computes.
// So a panel that is asked for comes next, and what else was going on goes on after it.

let turn = Promise.resolve();

export function alone(work) {
  const mine = turn.then(work);
  turn = mine.catch(() => {});
  return mine;
}

/** A turn for what needs this model, if it is still the one that is open. */
export function aloneWith(model, work) {
  return alone(() => {
    if (model !== page.model) throw new UserError("Another model was opened before this was done: try it once more.");
    return work();
  });
}

const going = new Map();

/** What is going on, for the head of the page: doing("train", "Training"); doing("train", "") when it is over. */
export function doing(what, words) {
  if (words) going.set(what, words);
  else going.delete(what);
  const idle = page.lost ? "The device is gone" : page.model ? "Ready" : "No model";
  const text = [...going.values()].join(" · ") || idle;
  if ($("doing").textContent !== text) $("doing").textContent = text;
  $("doing").classList.toggle("busy", going.size > 0);
}

export async function during(what, words, work) {
  doing(what, words);
  try {
    return await work();
  } finally {
    doing(what, "");
  }
}

// ---- those who want to know of a new model --------------------------------------------------------------------------

const asked = [];

export function onModel(tell) { asked.push(tell); }

export function setModel(model) {
  page.model?.destroy();
  Object.assign(page, { model, lenses: null });
  asked.forEach((tell) => tell(model));
}

/** The model, or UserError in words. */
export function needModel() {
  if (page.lost) throw new UserError(LOST);
  if (!page.gpu) throw new UserError(page.why || "The graphics card is not ready yet: wait a moment.");
  if (!page.model) throw new UserError("No model is open: open a checkpoint, or drop one on this page.");
  return page.model;
}

/** Token ids of a text, after the token that begins one, as sample.py and patching.py have it. */
export function idsOf(model, text) {
  if (!model.enc) throw new UserError("This checkpoint holds no tokenizer: it cannot read or write text.");
  const ids = [model.enc.bos, ...model.enc.encode(text)];
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
  return `This is a mistake of ours: ${error?.message ?? error}. The page goes on with what it had.`;
}

/** Run `work`; what goes wrong is told at `place`, an element's id. True if all went well. */
export async function attempt(place, work) {
  say(place, "");
  try {
    await work();
    return true;
  } catch (error) {
    if (!(error instanceof UserError)) await lossIsKnown();
    say(place, wordsOf(error));
    return false;
  }
}

/** If a device is lost, what waits for it may fail a moment before that is told. */
export async function lossIsKnown() {
  const moment = new Promise((resolve) => setTimeout(resolve, 1000));
  await Promise.race([moment, page.gpu?.lost]);
  await null;  // page.js hears of it, too
}

export function say(place, words) {
  $(place).textContent = words;
  $(place).hidden = !words;
}

/** With a new device, what was said of the loss is over. */
export function forgetLoss() {
  for (const { id, textContent } of document.querySelectorAll(".wrong")) if (textContent === LOST) say(id, "");
}

/** A number that was typed, or UserError. */
export function numberOf(id) {
  const input = $(id), name = input.parentElement.textContent.trim(), { min, max } = input;
  if (input.value === "" && input.placeholder && !input.validity.badInput) return null;
  if (!input.checkValidity() || input.value === "") {
    const whole = input.step === "1" ? "a whole number" : "a number";
    const [least, most] = [min, max].map((limit) => Number(limit).toLocaleString("en"));
    throw new UserError(`${name} must be ${whole} from ${least} to ${most}.`);
  }
  return Number(input.value);
}

// ---- the document ---------------------------------------------------------------------------------------------------

export const $ = (id) => document.getElementById(id);

/** An element. Attributes: on... are listeners, --... properties of its style, false and null are left out. */
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

/** A notice at the top of the page, with buttons {label: action}; it goes away when one is pressed, or by remove(). */
export function notice(words, buttons, role = "status") {
  const node = make("div", { class: "notice", role }, make("span", {}, words));
  for (const [label, action] of Object.entries(buttons)) {
    node.append(make("button", { type: "button", onclick: () => (node.remove(), action()) }, label));
  }
  $("notices").append(node);
  return node;
}

export const percent = (p) => `${(100 * p).toFixed(p >= 0.0995 ? 0 : p >= 0.00095 ? 1 : 2)}%`;
export const count = (n) => Math.round(n).toLocaleString("en");

export function many(n) {
  if (n < 1e6) return count(n);
  return n < 1e9 ? `${(n / 1e6).toFixed(n < 1e7 ? 2 : 0)} million` : `${(n / 1e9).toFixed(2)} billion`;
}

// ---- the figures of panels ------------------------------------------------------------------------------------------

export const resultOf = (name) => document.querySelector(`#${name} .result`);

/** A panel's result: words, and what is drawn. */
export function finish(name, words, ...figure) {
  resultOf(name).replaceChildren(...words);
  document.querySelector(`#${name} .figure`).replaceChildren(...figure);
  for (const part of figure) part.scrollLeft = part.scrollWidth;  // to the last token
}

// ---- tokens, for the eye and for the ear ----------------------------------------------------------------------------

const hex = (n) => `<${n.toString(16).toUpperCase().padStart(2, "0")}>`;

/** A token as text to look at: a dot for each blank, an arrow for the end of a line; bytes that are no text as <C3>. */
export function seen(enc, id) {
  if (!enc) return String(id);
  if (id === enc.bos || id === enc.eot) return "⟨text⟩";
  const text = enc.decode([id]);
  if (text.includes("\ufffd") || !text) return [...enc.pieces[id] ?? []].map(hex).join("") || "⟨none⟩";
  return text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥")
    .replace(/[\p{Cc}\p{Cf}]/gu, (character) => hex(character.codePointAt(0)));
}

/** As words to hear: a screen reader says nothing of dots. */
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
