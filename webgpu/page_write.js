// Writing: shows the text as it is generated, and for each token the candidates that the model gave a high probability.

import { $, queueWith, attempt, count, during, heard, idsOf, make, needModel, numberOf, onModel, page } from "./page_common.js";
import { bars } from "./page_draw.js";
import { chances, logitsAfter } from "./sampling.js";

// The sheet holds the prompt, its ids and its text, and for each token after it {id, top, context, forced, node}. enc: the tokenizer of the model
// that wrote it; at: the index of the token that is looked at, null: the newest one.
const sheet = { prompt: [], text: "", written: [], enc: null, model: null, at: null, stream: null };
let current = null;  // the generation that is going on: {abort, done}
let frame = 0;
let tellBegun;

/** Settles once there are a few words to read, or the generation has ended without them. */
export const begun = new Promise((resolve) => { tellBegun = resolve; });

export const isWriting = () => current !== null;

/** Settles once no text is being generated. */
export async function notWriting() {
  while (current) await current.done;
}

export async function stopWriting() {
  current?.abort.abort();
  await notWriting();
}

/** Generate a new text from the prompt. byItself: nobody has pressed a button; a prompt that the model cannot read is then
 *  left out. */
export async function beginText({ byItself = false } = {}) {
  await attempt("write-wrong", async () => {
    const model = needModel(), options = settings();
    let text = $("prompt").value, asChat = isChat(model), ids;
    try {
      ids = idsOf(model, text, asChat);
    } catch (error) {
      if (!byItself || !model.enc) throw error;
      [text, asChat, ids] = ["", false, [model.enc.bos ?? model.enc.eot]];
    }
    await stopWriting();
    Object.assign(sheet, { prompt: ids, text, written: [], enc: model.enc, model, at: null });
    $("sheet").replaceChildren(make("span", { class: asChat ? "yours message" : "yours" }, text));
    restream();
    draw();  // the bars of the text before are gone
    await goOn(options);
  });
  tellBegun();
}

/** Show a text that no open model has written: prompt and tokens, [{id, top}], in the order of append(). */
export function showText(enc, text, prompt, tokens) {
  Object.assign(sheet, { prompt, text, written: [], enc, model: null, at: null });
  $("sheet").replaceChildren(make("span", { class: "yours" }, text));
  restream();
  tokens.forEach(append);
  $("sheet").scrollTop = 0;
  draw();
}

/** Whether the prompt is a message for the model's chat template. */
const isChat = (model) => Boolean(model.chat) && $("form").value === "chat";

/** Show the choice of the prompt's form for a model that has a chat template. */
function showForm() {
  const { model } = page;
  $("form").hidden = !model?.chat;
  $("prompt-label").textContent = model && isChat(model) ? "Message" : "Prompt";
}

/** Cut the text before its i-th token, put another token there, and go on. */
function take(i, id) {
  return attempt("write-wrong", async () => {
    const model = needModel(), options = settings();
    await stopWriting();
    if (model !== sheet.model || !sheet.written[i]) return;
    const { top, context } = sheet.written[i];
    sheet.written.splice(i).forEach(({ node }) => node.remove());
    $("sheet").querySelector(".end")?.remove();
    restream();
    append({ id, top, context, forced: true });
    sheet.at = null;
    const max_new_tokens = Math.max(1, options.max_new_tokens - sheet.written.length);
    await goOn({ ...options, max_new_tokens, seed: (options.seed + i + 1) % 2 ** 32 });
  });
}

/** The settings of how the next token is drawn; the seed is a random one if none is given. */
export function settings() {
  const [temperature, top_k, top_p, min_p] = ["temperature", "top_k", "top_p", "min_p"].map(numberOf);
  return { temperature, top_k, top_p, min_p, max_new_tokens: numberOf("length"),
    seed: numberOf("seed") ?? Math.floor(Math.random() * 2 ** 32) };
}

async function goOn(options) {
  const abort = new AbortController();
  let over;
  current = { abort, done: new Promise((resolve) => { over = resolve; }) };
  $("write").textContent = "Stop";
  const caret = make("span", { class: "caret", "aria-hidden": "true" });
  $("sheet").append(caret);
  try {
    await during("write", "Writing", () => drawTokens(options, abort.signal));
  } finally {
    caret.remove();
    $("write").textContent = "Write";
    current = null;
    over();
    draw();
  }
}

async function drawTokens(options, signal) {
  const { model } = sheet, { block_size } = model.config, before = sheet.written.length;
  let ids = [...sheet.prompt, ...sheet.written.map(({ id }) => id)];
  if (ids.length > block_size) ids = ids.slice(-Math.ceil(block_size / 2));
  const tokens = model.generate(ids, { ...options, signal, probabilities: true });
  let began = 0;
  for (;;) {
    const { value, done } = await queueWith(model, () => tokens.next());
    if (done || signal.aborted) break;
    if (model.ends.has(value.token)) {
      $("sheet").append(make("span", { class: "end" }, " – the model ends its text here –"));
      break;
    }
    began ||= performance.now();
    append({ id: value.token, top: value.top, context: value.context, forced: false });
    const n = sheet.written.length - before, pace = (n - 1) / (performance.now() - began) * 1000;
    const speed = n > 1 ? `, ${pace < 10 ? pace.toFixed(1) : count(pace)} a second` : "";
    $("pace").textContent = `${count(sheet.written.length)} tokens${speed} · seed ${options.seed}`;
    frame ||= requestAnimationFrame(draw);
  }
  await tokens.return();
}

// ---- the sheet ------------------------------------------------------------------------------------------------------

/** A decoder that has decoded the whole sheet: a character may be cut between two tokens. */
function restream() {
  sheet.stream = sheet.enc?.stream();
  sheet.written.forEach(({ id }) => sheet.stream?.push(id));
}

function append(entry) {
  if (sheet.written.length > 8) tellBegun();
  const { id, top, forced } = entry, among = top?.find(([other]) => other === id);
  const p = among ? among[1] : Math.min(0.02, top?.at(-1)[1] ?? 1);
  const surprise = forced ? 0 : Math.min(1, Math.max(0, -Math.log2(p) / 6 - 0.15));
  const text = sheet.stream ? sheet.stream.push(id) : ` ${id}`;
  const look = { class: forced ? "t forced" : "t", "--s": surprise.toFixed(2), "data-i": sheet.written.length };
  entry.node = make("span", look, text);
  sheet.written.push(entry);
  const view = $("sheet"), atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
  const caret = view.querySelector(".caret");
  if (caret) caret.before(entry.node);
  else view.append(entry.node);
  if (atEnd) view.scrollTop = view.scrollHeight;
}

/** Show the bars and the slider for the token that is looked at. */
function draw() {
  frame = 0;
  const n = sheet.written.length, i = Math.min(sheet.at ?? n - 1, n - 1), entry = sheet.written[i];
  const scrub = $("scrub");
  scrub.disabled = !n;
  scrub.max = Math.max(1, n);
  scrub.value = i + 1;
  $("sheet").querySelector(".at")?.classList.remove("at");
  if (!entry) {
    bars($("next"), sheet.enc, []);
    $("next-says").textContent = "";
    $("scrub-says").textContent = "Look back";
    return;
  }
  if (sheet.at !== null) entry.node.classList.add("at");
  $("scrub-says").textContent = `Token ${count(i + 1)} of ${count(n)}`;
  const rows = (entry.top ?? []).map(([id, p]) => ({ id, p, taken: id === entry.id }));
  const drawing = drawnUnder(entry);
  scrub.setAttribute("aria-valuetext", `token ${i + 1}: ${heard(sheet.enc, entry.id)}. Best: ` +
    rows.slice(0, 3).map(({ id, p }) => `${heard(sheet.enc, id)} ${Math.round(100 * p)}%`).join(", "));
  if (rows.length && !rows.some(({ taken }) => taken)) {
    const words = drawing ? undefined : `< ${Math.max(1, Math.ceil(100 * rows.at(-1).p))}%`;
    rows.push({ id: entry.id, p: drawing?.p(entry.id) ?? 0, taken: true, words });
  }
  for (const row of drawing ? rows : []) Object.assign(row, { drawn: drawing.drawn(row.id), cut: FILTERS[drawing.cutBy(row.id)] });
  $("next-says").textContent = drawing ? drawnInWords(drawing, rows) : "";
  bars($("next"), sheet.enc, rows, (id) => id === entry.id && !entry.forced ? look(i) : take(i, id));
}

function look(i) {
  sheet.at = i;
  draw();
}

// ---- drawing under the settings ---------------------------------------------------------------------------------------

// The bars' second marks need the logits of all tokens, which are not kept as the text is written. So those of the token that is
// looked at are computed again, once for any settings; those of the newest token only after the last one is written.
const STILL = 250;  // milliseconds that a token is looked at before
const FILTERS = { temperature: "temperature 0", top_k: "top-k", top_p: "top-p", min_p: "min-p" };
let known = { entry: null, logits: null };

/** The chances() of a written token under the settings; null if they are not known yet, or if a setting is out of range. */
function drawnUnder(entry) {
  if (known.entry !== entry && (!current || sheet.at !== null)) {
    known = { entry, logits: null };
    setTimeout(() => computeLogits(entry), STILL);
  }
  try {
    return known.entry === entry && known.logits ? chances(known.logits, settings()) : null;
  } catch {
    return null;  // the Write button says which setting is wrong
  }
}

async function computeLogits(entry) {
  const { model, prompt, written } = sheet, at = written.indexOf(entry);
  if (known.entry !== entry || at < 0 || !model || model !== page.model) return;
  const ids = [...prompt, ...written.slice(0, at).map(({ id }) => id)].slice(-entry.context);
  await attempt("write-wrong", async () => {
    const logits = await queueWith(model, () => known.entry === entry ? logitsAfter(model, ids) : null);
    if (known.entry === entry) known.logits = logits;
  }, { asked: false });
  draw();
}

/** What the settings do to the tokens of the bars, in a sentence. */
function drawnInWords({ cutBy, kept }, rows) {
  const { temperature, ...filters } = settings(), left = Object.entries(kept);
  if (temperature === 0) return "Temperature 0 always takes the most probable token.";
  const of = (n, filter) => {
    const these = rows.filter(({ id }) => !cutBy(id) || left.findIndex(([name]) => name === cutBy(id)) > left.findIndex(([name]) => name === filter)).length;
    return these < rows.length ? `${these} of these` : `${count(n)} tokens`;
  };
  const kinds = left.map(([name, n]) => `${FILTERS[name]} ${filters[name]} keeps ${of(n, name)}`);
  return `At temperature ${temperature}, ${kinds.length ? kinds.join(", then ") : "all tokens can be drawn"}.`;
}

const tokenAt = (event) => event.target.closest?.(".t");

function listen() {
  const view = $("sheet");
  let pinned = null;
  view.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && tokenAt(event)) look(Number(tokenAt(event).dataset.i));
  });
  view.addEventListener("pointerleave", () => {
    sheet.at = pinned !== null && pinned < sheet.written.length ? pinned : null;
    draw();
  });
  view.addEventListener("click", (event) => {
    pinned = tokenAt(event) ? Number(tokenAt(event).dataset.i) : null;
    sheet.at = pinned;
    draw();
  });
  $("scrub").addEventListener("input", (event) => {
    const i = Number(event.target.value) - 1;
    pinned = i === sheet.written.length - 1 ? null : i;
    sheet.at = pinned;
    draw();
    sheet.written[i]?.node.scrollIntoView({ block: "nearest" });
  });
}

/** The text before the token that is looked at, or all of it; only its last tokens, as the panels show every token. */
export function textSoFar() {
  if (!sheet.enc) return "";
  const before = sheet.written.slice(0, sheet.at ?? sheet.written.length);
  const ids = [...sheet.enc.encode(sheet.text), ...before.map(({ id }) => id)];
  return sheet.enc.decode(ids.slice(-40));
}

export function setUpWriting() {
  listen();
  $("write-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (current) current.abort.abort();
    else beginText();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    beginText();
  });
  $("sampling").addEventListener("input", draw);
  $("form").addEventListener("change", showForm);
  onModel(showForm);
  const mark = () => $("sheet").classList.toggle("marked", $("mark").checked);
  $("mark").addEventListener("change", mark);
  mark();
}
