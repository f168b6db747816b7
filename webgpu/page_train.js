// The training panel: the text, the settings, the run with its chart and samples, and storage of the run.

import { UserError } from "./errors.js";
import { configOf, parametersOf } from "./gpt.js";
import { textOf } from "./fetching.js";
import { $, queue, attempt, count, doing, during, idsOf, lossIsKnown, make, many, needModel, notice, numberOf, onModel,
  page } from "./page_common.js";
import { lossChart } from "./page_draw.js";
import { discardRun, keepText, keptRun, keptText, recall, remember, saveRun } from "./page_store.js";
import { isWriting, notWriting } from "./page_write.js";
import { byteTokenizer, charTokenizer } from "./tokenizer.js";
import { Trainer, windowOf } from "./train.js";

const SHOWN = 200_000;       // the largest number of characters of a text that can be edited
const LARGEST = 50_000_000;  // bytes of a text
const OFTEN = 20_000;        // milliseconds between two saves
const SOON = 3_000;          // milliseconds to the first save
const SETTINGS = ["batch_size", "learning_rate", "max_iters"];
const LARGER = { n_layer: 4, n_head: 4, n_embd: 128, block_size: 128, batch_size: 16, learning_rate: 0.003,
  max_iters: 1000, sample_every: 100 };
const OWN_CODE = ["gpt.js", "gpu.js", "train.js", "inside.js", "tokenizer.js", "safetensors.js"];

// The run: {trainer, name, text, state: going | paused | finished | ended, train, held: [[step, loss]], kept, saved: step, ...}
let run = null;

// ---- the text -------------------------------------------------------------------------------------------------------

const source = { name: "", text: null };  // text: one that is too long for its field; null: what the field holds
let timer = 0;
let before = "";  // the typed text that another text has replaced

const textNow = () => source.text ?? $("text").value;

function setText(text, name) {
  const long = text.length > SHOWN, typed = source.name === "" && source.text === null && $("text").value;
  if (typed && typed !== text) before = typed;
  $("text-back").hidden = !before;
  Object.assign(source, { name, text: long ? text : null });
  $("text").value = long ? `${text.slice(0, 5000)}\n…` : text;
  $("text").readOnly = long;
  remember("text", { name, long, text: long ? "" : text });
  if (long) keepText(text).catch(() => {});  // without such storage, the file must be dropped again next time
  describe();
}

async function recallText() {
  const kept = recall("text"), there = kept?.long ? await keptText() : kept?.text;
  const [text, name] = kept ? [there, kept.name] : await ownCode();
  if (text !== null && !textNow()) setText(text, name);  // unless a file was dropped meanwhile
}

/** A text to begin with, which is always available: the page's own code. */
export async function ownCode() {
  const parts = await Promise.all(OWN_CODE.map(textOf));
  return [parts.join("\n"), "this page's own code"];
}

/** A file that was dropped or chosen. */
export async function takeText(file) {
  await attempt("train-wrong", async () => {
    let text;
    if (file.size > LARGEST) {
      throw new UserError(`${file.name} is larger than ${LARGEST / 1e6} MB: take a part of it, or train with python train.py.`);
    }
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    } catch {
      throw new UserError(`${file.name} is not in UTF-8: save it as a UTF-8 text.`);
    }
    if (!text.trim()) throw new UserError(`${file.name} is empty: the text was not changed.`);
    setText(text.replaceAll("\r\n", "\n"), file.name);
  });
}

// ---- the settings ---------------------------------------------------------------------------------------------------

function sizes() {
  const [n_layer, n_head, n_embd, block_size] = ["n_layer", "n_head", "n_embd", "block_size"].map(numberOf);
  const near = Math.max(1, Math.round(n_embd / 2 / n_head)) * 2 * n_head;
  if (n_embd % (2 * n_head)) {
    throw new UserError(`A width of ${n_embd} cannot be divided into ${n_head} heads of even width: take ${near}.`);
  }
  return { n_layer, n_head, n_embd, block_size };
}

let made = { text: null, tokenizer: null };

/** charTokenizer(), once for each text: for a long text it takes half a second, and it is needed after every key press. */
function charactersOf(text) {
  if (made.text !== text) made = { text, tokenizer: charTokenizer(text) };
  return made.tokenizer;
}

function fromScratch(text) {
  const tokenizer = $("tokens").value === "char" ? charactersOf(text) : byteTokenizer();
  const tokens = tokenizer.tokens.length + 1;  // and the one that ends a text
  return { tokenizer, config: configOf({ ...sizes(), vocab_size: Math.ceil(tokens / 64) * 64 }) };
}

/** Describe the text and the size of the model in a line each. */
function describe() {
  const text = textNow(), scratch = $("begin").value === "scratch";
  const part = source.text === null ? "" : "of which the first are shown";
  $("text-says").textContent = [source.name, `${count(text.length)} characters`, part].filter(Boolean).join(", ");
  for (const id of ["tokens", "n_layer", "n_head", "n_embd", "block_size"]) {
    $(id).disabled = isOpen();
    $(id).parentElement.hidden = !scratch;  // the open model has sizes of its own
  }
  let words = "";
  try {
    const config = scratch ? fromScratch(text).config : page.model?.config;
    if (config) {
      const n = [...parametersOf(config).values()].reduce((sum, shape) => sum + shape.reduce((a, b) => a * b), 0);
      const window = scratch ? config.block_size : windowOf(config);
      words = `${many(n)} parameters, ${count(numberOf("batch_size") * window)} tokens per update` +
        `${window < config.block_size ? `, in windows of ${window}, which will be the new model's context` : ""}.`;
    }
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    words = error.message;
  }
  if (run) $("resume").disabled = !canGoOn();
  $("train-size").textContent = `${words} ${resumeInWords()}`;
}

const isOpen = () => ["going", "paused"].includes(run?.state);

/** Whether the run that has stopped can go on: it has updates to do. */
const canGoOn = () => ["paused", "finished"].includes(run.state) && Number($("max_iters").value) > run.trainer.updates;

function resumeInWords() {
  if (!["paused", "finished"].includes(run?.state)) return "";
  const now = count(run.trainer.updates);
  return canGoOn() ? `Resume goes on from update ${now}, with this learning rate.` : `To resume the run, raise Updates above ${now}.`;
}

/** Larger default settings for a fast device. */
function defaults() {
  if (page.gpu.info.fallback) return;
  for (const [id, value] of Object.entries(LARGER)) {
    const untouched = $(id).value === $(id).defaultValue;
    $(id).defaultValue = value;
    if (untouched) $(id).value = value;
  }
}

/** Other default settings for a model that is already trained: smaller steps, and on a slow device smaller batches. */
function beginChanged() {
  const scratch = $("begin").value === "scratch", rate = $("learning_rate");
  if (!scratch && rate.value === rate.defaultValue) rate.value = 0.0005;
  else if (scratch && rate.value === "0.0005") rate.value = rate.defaultValue;
  const batch = $("batch_size");
  if (page.gpu?.info.fallback) {
    if (!scratch && batch.value === batch.defaultValue) batch.value = 2;
    else if (scratch && batch.value === "2") batch.value = batch.defaultValue;
  }
  describe();
}

// ---- the run --------------------------------------------------------------------------------------------------------

function start() {
  return attempt("train-wrong", async () => {
    if (!page.gpu) needModel();
    const text = textNow(), settings = Object.fromEntries(SETTINGS.map((id) => [id, numberOf(id)]));
    numberOf("sample_every");
    if (!text) throw new UserError("There is no text to learn from: type or paste one, or drop a file.");
    const model = $("begin").value === "model" ? needModel() : null;
    if (model && !model.enc) idsOf(model, text);
    const what = model ? { model } : fromScratch(text);
    const trainer = await during("train", "Preparing", () =>
      queue(() => Trainer.create(page.gpu, { ...what, text, ...settings, makeRoom: end })));
    begin({ trainer, text, name: source.name || "your text", train: [], held: [], samples: [], saved: 0 });
    await claim();
    await goOn();
  });
}

function begin(parts) {
  run = { state: "paused", perUpdate: 0, savedAt: performance.now(), kept: false, ...parts };
  $("samples").replaceChildren();
  run.samples.forEach(showSample);
  $("train-says").textContent = "";
  $("download-says").hidden = true;
}

/** Free the memory of the previous run. */
function end() {
  run?.trainer.destroy();
  run?.release?.();
  run = null;
}

/** Claim the storage, which only one tab can use at a time; in other tabs, say so. */
async function claim() {
  const mine = run;
  const tell = (words) => { $("train-says").textContent = words; };
  if (!navigator.locks || !navigator.storage?.getDirectory) {
    return tell("This browser cannot store the run: download the model before you close the tab.");
  }
  await new Promise((got) => navigator.locks.request("tinygpt training", { ifAvailable: true }, (lock) => {
    mine.kept = Boolean(lock);
    if (!lock) tell("Another tab is training, and only one run can be stored: download this one before you close the tab.");
    got();
    return lock ? new Promise((release) => { mine.release = release; }) : null;
  }));
}

/** Go on, with the settings that can be changed during a run. */
function resume() {
  return attempt("train-wrong", () => {
    Object.assign(run.trainer.settings, { max_iters: numberOf("max_iters"), learning_rate: numberOf("learning_rate") });
    return goOn();
  });
}

async function goOn() {
  const mine = run, { trainer } = mine;
  mine.state = "going";
  show();
  try {
    await during("train", "Training", async () => {
      if (!mine.held.length) await judge(mine);
      while (mine.state === "going" && trainer.updates < trainer.settings.max_iters) {
        if (isWriting()) await letWrite();
        await update(mine);
      }
      if (mine.held.at(-1)[0] !== trainer.updates) await judge(mine);
      await keep(mine);
    });
  } catch (error) {
    if (!(error instanceof UserError)) await lossIsKnown();
    if (page.lost) end();  // once there is a device again, the page offers the run as it was last saved
    throw error;
  } finally {
    if (mine.state === "going") mine.state = isDone(mine) ? "finished" : "paused";
    show();
  }
  tellEnd(mine);
}

const isDone = ({ trainer }) => trainer.updates >= trainer.settings.max_iters;

function tellEnd(mine) {
  const words = isDone(mine) ? "All updates are done" : mine.state === "ended" ? "Stopped" : "Paused";
  $("train-says").textContent = `${words} at update ${count(mine.trainer.updates)}.` +
    (mine.kept ? " The run is stored in this browser until another one begins." :
      " It is not stored: download it before you close the tab.") +
    (mine.state === "paused" ? "" : " A new run replaces this one: download it first, if you want to keep it.");
}

async function letWrite() {
  doing("train", "Training waits");
  await notWriting();
  doing("train", "Training");
}

async function update(mine) {
  const { trainer } = mine, every = Number($("sample_every").value) || 50, began = performance.now();
  const { step, loss, norm } = await queue(() => trainer.step());
  if (!Number.isFinite(loss) || !Number.isFinite(norm)) {
    mine.state = "ended";
    throw new UserError(`At update ${step} the loss is not a number: begin again with a smaller learning rate.` +
      (mine.saved ? ` Update ${mine.saved} is stored.` : ""));
  }
  const time = performance.now() - began;
  mine.perUpdate = mine.perUpdate ? 0.9 * mine.perUpdate + 0.1 * time : time;
  mine.train.push([step, loss]);
  if (step % Math.max(1, Math.round(trainer.settings.max_iters / 40)) === 0) await judge(mine);
  if (step % every === 0) await sample(mine);
  if (performance.now() - mine.savedAt > (mine.saved ? OFTEN : SOON)) await keep(mine);
  showSoon();
}

async function judge(mine) {
  mine.held.push([mine.trainer.updates, await queue(() => mine.trainer.evaluate())]);
}

/** The mean of the last 20 losses. */
function recent(train) {
  const last = train.slice(-20);
  return last.reduce((sum, [, loss]) => sum + loss, 0) / last.length;
}

async function sample(mine) {
  const { trainer } = mine, { enc } = trainer, step = trainer.updates;
  let first = [enc.bos ?? enc.eot];
  try {
    first = [...enc.encode("\n")];
  } catch {}  // the text has one line, and its tokenizer no line break
  const ids = [], max_new_tokens = enc.kind === "bpe" ? 60 : 160;
  const tokens = trainer.model.generate(first, { max_new_tokens, temperature: 0.8, seed: step });
  for (;;) {
    const { value, done } = await queue(() => tokens.next());
    if (done || trainer.model.ends.has(value.token)) break;
    ids.push(value.token);
  }
  await tokens.return();
  mine.samples.push({ step, loss: recent(mine.train), text: enc.decode(ids) });
  mine.samples = mine.samples.slice(-20);
  if (mine === run) showSample(mine.samples.at(-1));
}

// ---- showing the run ------------------------------------------------------------------------------------------------

function showSample({ step, loss, text }) {
  const title = make("b", {}, `update ${count(step)}, loss ${loss.toFixed(2)}`);
  $("samples").prepend(make("li", {}, title, make("p", {}, text)));
  while ($("samples").children.length > 20) $("samples").lastChild.remove();
}

let waiting = false;

function showSoon() {
  if (waiting) return;
  waiting = true;
  setTimeout(() => {
    waiting = false;
    showCourse();
  }, 200);
}

function clock(seconds) {
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function showCourse() {
  if (!run) return;
  const { trainer, train, held, perUpdate } = run, { batch_size, max_iters } = trainer.settings;
  $("m-step").textContent = `${count(trainer.updates)} of ${count(max_iters)}`;
  $("m-loss").textContent = train.length ? recent(train).toFixed(3) : "–";
  $("m-val").textContent = held.length ? held.at(-1)[1].toFixed(3) : "–";
  $("m-pace").textContent = perUpdate ? count(1000 * batch_size * trainer.config.block_size / perUpdate) : "–";
  const left = (max_iters - trainer.updates) * perUpdate / 1000;
  $("m-left").textContent = perUpdate && run.state === "going" ? clock(left) : "–";
  drawChart(train, held, max_iters);
  $("after").hidden = !trainer.updates;
  $("samples-title").hidden = !run.samples.length;
}

function drawChart(train, held, until) {
  $("chart").replaceChildren(...lossChart({ train, held, until, W: $("chart").clientWidth || undefined }));
}

function show() {
  const state = run?.state, focused = document.activeElement;
  $("resume").hidden = !["paused", "finished"].includes(state);
  $("resume").classList.toggle("main", state === "paused");
  $("start").textContent = run ? "Start a new run" : "Start";
  $("start").hidden = isOpen();
  $("pause").hidden = state !== "going";
  $("stop").hidden = !isOpen();
  for (const id of ["begin", "batch_size"]) $(id).disabled = isOpen();
  describe();
  const next = ["pause", "resume", "start"].map($).find((each) => !each.hidden && !each.disabled);
  if (focused.hidden) next?.focus();  // for users of the keyboard
  showCourse();
}

function pause(state) {
  const wasGoing = run.state === "going";
  run.state = state;
  show();
  if (!wasGoing) return attempt("train-wrong", () => keep(run));
}

// ---- files ----------------------------------------------------------------------------------------------------------

/** Store the run, so that it can go on when the page is opened again. */
async function keep(mine) {
  if (!mine.kept || mine.saving || mine.saved === mine.trainer.updates) return;
  mine.saving = true;
  try {
    const { name, text, train, held, samples, trainer } = mine, { max_iters, learning_rate } = trainer.settings;
    const { step, checkpoint, optimizer } = await queue(async () =>
      ({ step: trainer.updates, ...await trainer.save() }));
    const upTo = (points) => points.filter(([at]) => at <= step);  // there may be newer ones meanwhile
    const { n_layer, n_head, n_embd } = trainer.config, sizes = { n_layer, n_head, n_embd };
    const state = { name, step, sizes, settings: { max_iters, learning_rate }, train: upTo(train), held: upTo(held),
      samples: samples.filter((each) => each.step <= step), when: Date.now() };
    await saveRun({ checkpoint, optimizer, text: mine.textKept ? null : text }, state);
    Object.assign(mine, { saved: step, savedAt: performance.now(), textKept: true });
  } catch (error) {
    await lossIsKnown();
    if (page.lost) throw error;
    mine.kept = false;  // the disk is full, most likely: go on without storage
    console.warn(error);
    $("train-says").textContent = "The run could not be stored in this browser (is its storage full?): download it " +
      "before you close the tab.";
  } finally {
    mine.saving = false;
  }
}

let offer = null;

/** When the page opens: offer the stored run, if there is one and no other tab uses it. */
export async function offerRun() {
  defaults();
  offer?.remove();
  const held = await navigator.locks?.query();
  if (run || !held || held.held.some(({ name }) => name === "tinygpt training")) return;
  const kept = await keptRun();
  if (!kept || run) return;
  const { name, step, sizes, settings, held: losses, when } = kept.state;
  const time = new Date(when).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
  const words = `A training run on ${name} was stored at ${time}: update ${count(step)} of ${count(settings.max_iters)}` +
    (sizes ? `, a model of ${sizes.n_layer} layer${sizes.n_layer > 1 ? "s" : ""} and width ${sizes.n_embd}` : "") +
    (losses.length ? `, held-out loss ${losses.at(-1)[1].toFixed(2)}` : "") + (step < settings.max_iters ? "." :
      ". All its updates are done: you can download it, write with it, or train it for more updates.");
  offer = notice(words, { Continue: () => goOnWith(kept), Discard: () => discardRun() });
}

function goOnWith({ files, state }) {
  document.dispatchEvent(new CustomEvent("choose", { detail: "train" }));
  $("tab-train").focus();  // the button that had the focus is gone
  return attempt("train-wrong", async () => {
    if (!page.gpu) needModel();
    const text = await files.text.text(), { checkpoint, optimizer } = files;
    const trainer = await during("train", "Preparing", () => queue(() =>
      Trainer.create(page.gpu, { resume: { checkpoint, optimizer }, text, ...state.settings })));
    const { name, train, held, samples } = state;
    begin({ trainer, text, name, train, held, samples, saved: trainer.updates, textKept: true });
    $("max_iters").value = state.settings.max_iters;
    $("learning_rate").value = state.settings.learning_rate;
    show();
    await claim();
    if (!isDone(run)) return goOn();
    run.state = "finished";
    show();
    tellEnd(run);
  });
}

function download() {
  return attempt("train-wrong", async () => {
    const { checkpoint, name, optimizer, optimizerName } = await queue(() => run.trainer.save());
    for (const [blob, file] of [[checkpoint, name], [optimizer, optimizerName]]) {
      const url = URL.createObjectURL(blob);
      make("a", { href: url, download: file }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    }
    const any = ["char", "byte"].includes(run.trainer.enc.kind);
    $("resume-says").textContent = any ? "TEXT" : "DATA (tokens of the same tokenizer)";
    $("download-says").hidden = false;
  });
}

/** Open the trained model, for writing and for the other panels. */
function adopt() {
  return attempt("train-wrong", async () => {
    const { checkpoint } = await queue(() => run.trainer.save());
    const file = new File([checkpoint], `trained-${run.trainer.updates}.safetensors`);
    document.dispatchEvent(new CustomEvent("checkpoint", { detail: file }));
  });
}

// ---- setting up -----------------------------------------------------------------------------------------------------

export function setUpTraining() {
  $("train-form").addEventListener("submit", (event) => {  // by the Enter key in a field, too: that presses Resume, the first button
    event.preventDefault();
    if (run && event.submitter === $("resume")) resume();
    else start();
  });
  $("pause").addEventListener("click", () => pause("paused"));
  $("stop").addEventListener("click", () => pause("ended"));
  $("download").addEventListener("click", download);
  $("adopt").addEventListener("click", adopt);
  $("own-code").addEventListener("click", () => attempt("train-wrong", async () => setText(...await ownCode())));
  $("text-back").addEventListener("click", () => {
    setText(before, "");
    $("text").focus();
  });
  $("empty-text").addEventListener("click", () => { setText("", ""); $("text").focus(); });
  const typed = () => {
    clearTimeout(timer);
    if (source.text === null) remember("text", { name: source.name, long: false, text: $("text").value });
  };
  $("text").addEventListener("input", () => {
    seen = true;
    source.name = "";
    clearTimeout(timer);
    timer = setTimeout(() => { typed(); describe(); }, 300);
  });
  $("begin").addEventListener("change", beginChanged);
  $("train-form").addEventListener("input", ({ target }) => target.id !== "text" && describe());
  onModel(describe);
  let seen = false;  // whether the field holds the text that was stored, or a newer one
  document.addEventListener("panel", async ({ detail }) => {
    if (detail !== "train" || seen) return;
    showEmpty();
    if ($("text").value || await attempt("train-wrong", recallText)) seen = true;  // typing meanwhile has set it already
  });
  const hide = () => {
    if (seen) typed();
    if (run?.state === "going") keep(run).catch(() => {});
  };
  addEventListener("resize", showCourse);
  addEventListener("pagehide", hide);
  addEventListener("beforeunload", (event) => { if (isOpen() && !run.kept) event.preventDefault(); });  // the browser asks
  document.addEventListener("visibilitychange", () => document.hidden && hide());
}

function showEmpty() {
  if (!run) drawChart([], [], Number($("max_iters").value) || 1);
  describe();
}
