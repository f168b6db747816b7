// The page: opens the device and a checkpoint, and brings what is dropped on it to the part that it is for. What is
// computed is computed elsewhere: gpt.js, inside.js, train.js.

import { UserError } from "./errors.js";
import { GPT } from "./gpt.js";
import { climb, GPU, megabytes } from "./gpu.js";
import { $, alone, attempt, count, doing, during, make, many, needModel, notice, onModel, page, say, setModel, wordsOf } from "./page_common.js";
import { lookByItself, setUpLooking, takeLens } from "./page_look.js";
import { recall, remember, keepFields } from "./page_store.js";
import { offerRun, setUpTraining, takeText } from "./page_train.js";
import { setUpSpeed, showLadder } from "./page_speed.js";
import { beginText, notWriting, setUpWriting, stopWriting } from "./page_write.js";

const TEXTS = /\.(txt|md|py|js|mjs|ts|json|jsonl|csv|tsv|html?|css|wgsl|c|h|cc|cpp|rs|go|java|sh|toml|ya?ml|xml|tex|rst|log|srt)$/i;
const ELSEWHERE = [  // what is no checkpoint of ours, and what makes one of it
  [/\.gguf$/i, "python gguf_reader.py makes a checkpoint of it"],
  [/\.(bin|pt|pth|ckpt)$/i, "python hf_reader.py makes a checkpoint of a Hugging Face folder"],
];

// ---- the device -----------------------------------------------------------------------------------------------------

async function openDevice() {
  const gpu = await GPU.open();
  Object.assign(page, { gpu, lost: false, why: "" });
  gpu.lost.then((message) => lose(gpu, message));
  showLadder();
}

/** The device went away: a driver that was restarted, too much memory, a laptop that slept. */
async function lose(gpu, message) {
  if (page.gpu !== gpu) return;
  console.warn(`The device was lost: ${message}`);
  const blob = page.model?.blob;
  Object.assign(page, { gpu: null, model: null, lenses: null, lost: true });
  doing("write", "");
  notice("The graphics card's device was lost. What you typed is still here, and so is the training up to its last save.", {
    "Reload the device": () => reopen(blob),
  }, "alert");
}

async function reopen(blob) {
  const well = await attempt("card-wrong", async () => {
    await during("open", "Opening the device", openDevice);
    if (blob) await load(blob);
  });
  if (!well) return notice("The device could not be opened again.", { "Try once more": () => reopen(blob), "Reload the page": () => location.reload() }, "alert");
  offerRun();
}

// ---- the model ------------------------------------------------------------------------------------------------------

/** Open a checkpoint; until it is whole, and if it is none, the page goes on with the one that it has. */
function openModel(blob) {
  return attempt("card-wrong", async () => {
    if (!page.gpu) needModel();
    await during("open", `Reading ${blob.name ?? "the checkpoint"}`, () => load(blob));
  });
}

async function load(blob) {
  const bar = $("loading");
  bar.hidden = false;
  try {
    const model = await alone(() => GPT.load(page.gpu, blob, (share) => { bar.value = share; }));
    await stopWriting();
    await alone(() => setModel(model));
  } finally {
    bar.hidden = true;
    bar.value = 0;
  }
  beginText({ byItself: true }).then(lookByItself);
}

function showCard(model) {
  const { config, meta, enc, blob } = model, { losses } = meta;
  const norm = { rms: "RMSNorm", layer: "LayerNorm" }[config.norm], mlp = { relu2: "ReLU²", gelu: "GELU", gelu_tanh: "GELU (tanh)", swiglu: "SwiGLU" }[config.mlp];
  const pos = config.alibi ? "ALiBi" : { rope: "rotary", learned: "learned positions", none: "no positions" }[config.pos];
  const groups = config.n_kv_head < config.n_head ? ` (${config.n_kv_head} of keys)` : "";
  const window = config.sliding_window ? `, window ${config.sliding_window} ${config.window_pattern}` : "";
  const rows = [
    ["Parameters", many(model.n_parameters)],
    ["Weights", `${megabytes(blob.size)}, ${model.format}`],
    ["Layers", `${config.n_layer} of ${config.n_head} heads${groups}, width ${config.n_embd}`],
    ["Design", `${pos}, ${norm}, ${mlp}${config.qk_norm ? ", QK-norm" : ""}${config.tie ? ", tied" : ""}`],
    ["Reads", `${count(config.block_size)} tokens of ${count(config.vocab_size)}${enc ? ` (${{ byte: "bytes", char: "characters", bpe: "BPE", hf: "Hugging Face" }[enc.kind]})` : ""}${window}`],
    ["Loss", Number.isFinite(losses?.val) ? `${losses.val.toFixed(2)} nats a token held out${Number.isFinite(losses.bits_per_byte) ? `, ${losses.bits_per_byte.toFixed(2)} bits a byte` : ""}` : null],
    ["Made by", [meta.script, meta.step ? `update ${count(meta.step)}` : ""].filter(Boolean).join(", ") || null],
  ].filter(([, value]) => value);
  $("card-name").textContent = blob.name ?? "checkpoint";
  $("card").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  const drawn = config.n_layer <= 12 && config.n_head <= 8;
  $("glyph").replaceChildren(...Array.from({ length: drawn ? config.n_layer : 0 }, () =>
    make("span", {}, ...Array.from({ length: config.n_head }, () => make("b")), make("b", { class: "mlp" }))));
}

// ---- the server's checkpoints ---------------------------------------------------------------------------------------

async function listServed() {
  const found = await fetch("checkpoints.json").then((answer) => answer.ok ? answer.json() : []).catch(() => []);
  if (!found.length) return;
  const served = $("served");
  served.hidden = false;
  served.querySelector("summary").textContent = `${found.length} checkpoint${found.length > 1 ? "s" : ""} of this server`;
  served.querySelector("ul").replaceChildren(...found.map((each) => make("li", {},
    make("button", { type: "button", onclick: () => openServed(each) }, each.name,
      make("span", {}, [each.parameters ? many(each.parameters) : "packed", megabytes(each.size)].join(", "))))));
}

function openServed({ name, path }) {
  return attempt("card-wrong", async () => openModel(await fetched(path.replace(/^\//, ""), name)));
}

async function fetched(path, name) {
  const answer = await fetch(path).catch(() => null);
  if (!answer) throw new UserError(`${name} could not be fetched: is the server still there?`);
  if (!answer.ok) throw new UserError(`${name} could not be fetched (${answer.status}): it may have been moved.`);
  return new File([await answer.blob()], name.split("/").at(-1));
}

// ---- what is dropped or chosen --------------------------------------------------------------------------------------

async function kindOf(file) {
  if (/\.lenses$/i.test(file.name)) return "lens";
  if (/\.safetensors$/i.test(file.name)) return (await metaOf(file))?.lens ? "lens" : "model";
  if (ELSEWHERE.some(([name]) => name.test(file.name))) return "";
  if (TEXTS.test(file.name) || file.type.startsWith("text/")) return "text";
  const bytes = new Uint8Array(await file.slice(0, 65536).arrayBuffer());
  if (bytes[8] === 0x7b && bytes[7] === 0) return (await metaOf(file))?.lens ? "lens" : "model";
  try {  // a text of another name: UTF-8, but for a character that is cut at the end, and no zeros
    new TextDecoder("utf-8", { fatal: true }).decode(bytes, { stream: true });
    return bytes.length && !bytes.includes(0) ? "text" : "";
  } catch {
    return "";
  }
}

async function metaOf(file) {
  const { readHeader } = await import("./safetensors.js");
  return readHeader(file).then(({ meta }) => meta, () => null);
}

async function takeFiles(files) {
  const order = ["model", "lens", "text", ""];
  const found = await Promise.all([...files].map(async (file) => ({ file, kind: await kindOf(file) })));
  found.sort((a, b) => order.indexOf(a.kind) - order.indexOf(b.kind));
  for (const { file, kind } of found) {
    if (kind === "model") await openModel(file);
    else if (kind === "lens") choose("lens"), await takeLens(file);
    else if (kind === "text") choose("train"), await takeText(file);
    else say("card-wrong", `${file.name} is neither a checkpoint (.safetensors), nor its lenses, nor a text` +
      `${ELSEWHERE.find(([name]) => name.test(file.name))?.[1].replace(/^/, ": ") ?? ": nothing was changed"}.`);
  }
}

function setUpFiles() {
  document.addEventListener("checkpoint", ({ detail }) => openModel(detail).then((well) => well && $("writing").scrollIntoView()));
  $("open").addEventListener("change", async ({ target }) => {
    await takeFiles(target.files);
    target.value = "";  // so that the same file can be chosen again
  });
  const hasFiles = (event) => [...event.dataTransfer?.types ?? []].includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    $("drop").hidden = false;
  });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    $("drop").hidden = true;
    takeFiles(event.dataTransfer.files);
  });
}

// ---- tabs, colours --------------------------------------------------------------------------------------------------

const tabs = () => [...document.querySelectorAll("[role=tab]")];

function choose(name) {
  for (const tab of tabs()) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  document.dispatchEvent(new CustomEvent("panel", { detail: name }));
}

function setUpTabs() {
  for (const tab of tabs()) tab.addEventListener("click", () => choose(tab.id.slice(4)));
  document.addEventListener("choose", ({ detail }) => choose(detail));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const all = tabs(), at = all.indexOf(document.activeElement);
    const to = { ArrowRight: (at + 1) % all.length, ArrowLeft: (at + all.length - 1) % all.length, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    all[to].focus();
    choose(all[to].id.slice(4));
  });
}

function setUpColours() {
  const names = ["auto", "dark", "light"], button = $("theme");
  const show = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.querySelector("span").textContent = name;
    button.setAttribute("aria-label", `Colours: ${name === "auto" ? "as the system has them" : name}`);
    document.dispatchEvent(new CustomEvent("colours"));
  };
  button.addEventListener("click", () => {
    const next = names[(names.indexOf(button.querySelector("span").textContent) + 1) % names.length];
    remember("colours", next);
    show(next);
  });
  show(names.includes(recall("colours")) ? recall("colours") : "auto");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new CustomEvent("colours")));
}

// ---- the opening ----------------------------------------------------------------------------------------------------

async function open() {
  setUpColours();
  keepFields();
  onModel(showCard);
  [setUpWriting, setUpFiles, setUpTabs, setUpLooking, setUpTraining, setUpSpeed].forEach((each) => each());
  listServed();
  const demo = fetched("demo.safetensors", "demo.safetensors").catch((error) => error);
  try {
    await openDevice();
  } catch (error) {
    page.why = wordsOf(error);
    notice(page.why, {}, "alert");
    doing("open", "");
    return;
  }
  const file = await demo;
  if (file instanceof Error) {
    say("card-wrong", `${wordsOf(file)} Open a checkpoint of your own.`);
    doing("open", "");
  } else {
    await openModel(file);
  }
  offerRun();
  await notWriting();
  await during("climb", "Trying faster kernels", () => alone(() => climb(page.gpu, showLadder))).catch((error) => say("speed-wrong", wordsOf(error)));
}

open();
