// The page: opens the device and a checkpoint, and gives each file that is dropped on it to the part that it is for. The
// computation is in gpt.js, inside.js and train.js.

import { fetched, imported, LostConnection } from "./fetching.js";
import { GPT } from "./gpt.js";
import { chooseKernels, GPU, megabytes } from "./gpu.js";
import { showCard } from "./page_card.js";
import { $, queue, attempt, during, forgetLoss, make, many, needModel, notice, onModel, page, say, setModel,
  showDoing, wordsOf } from "./page_common.js";
import { setUpLinks } from "./page_link.js";
import { lookByItself, setUpLooking, takeLens } from "./page_look.js";
import { MODELS, modelFile, setUpModels, takePrompts } from "./page_models.js";
import { recall, remember, keepFields, setValue } from "./page_store.js";
import { offerRun, ownCode, setUpTraining, takeText } from "./page_train.js";
import { setUpSpeed, showChoices } from "./page_speed.js";
import { readHeader } from "./safetensors.js";
import { beginText, begun, setUpWriting, stopWriting } from "./page_write.js";

// Modules that are not needed at the start.
const LATER = ["page_picture.js", "page_examples.js", "page_tour.js", "page_steer.js", "bench.js", "page_flow.js", "page_recording.js"];

const TEXTS = /\.(txt|md|rst|tex|log|srt|csv|tsv|jsonl?|ya?ml|html?|css|wgsl|py|m?js|ts|c|h|cc|cpp|rs|go|java|sh)$/i;
const FOREIGN = [  // other files, and what to do with them
  [/\.gguf$/i, "python gguf_reader.py makes a checkpoint of it"],
  [/\.(bin|pt|pth|ckpt)$/i, "python hf_reader.py makes a checkpoint of a Hugging Face folder"],
  [/\.(zip|gz|tgz|bz2|xz|zst|7z|rar|tar)$/i, "unpack it, and drop the file that is in it"],
  [/./, "drop another file; nothing was changed"],
];

// ---- the device -----------------------------------------------------------------------------------------------------

async function openDevice() {
  const gpu = await GPU.open();
  Object.assign(page, { gpu, lost: false, why: "" });
  gpu.lost.then((message) => lose(gpu, message));
  showChoices();
}

/** The device was lost: the driver was restarted, memory ran out, or the laptop slept. */
async function lose(gpu, message) {
  if (page.gpu !== gpu) return;
  console.warn(`The device was lost: ${message}`);
  const blob = page.model?.blob;
  Object.assign(page, { gpu: null, model: null, lenses: null, lost: true });
  showDoing();
  notice("The graphics card's device was lost. What you typed is still here, and so is the training up to its last " +
    "save.", { "Reload the device": () => reopen(blob) }, "alert");
}

async function reopen(blob) {
  const well = await attempt("card-wrong", async () => {
    await during("open", "Opening the device", openDevice);
    if (blob) await load(blob);
  });
  if (well) {
    forgetLoss();
    return offerRun();
  }
  notice("The device could not be opened again.", {
    "Try once more": () => reopen(blob), "Reload the page": () => location.reload() }, "alert");
}

// ---- the model ------------------------------------------------------------------------------------------------------

/** Open a checkpoint. The page keeps the model that it has until the new one is loaded, and also if that fails. */
function openModel(blob) {
  return attempt("card-wrong", async () => {
    if (!page.gpu) needModel();
    await during("open", `Reading ${blob.name ?? "the checkpoint"}`, () => load(blob));
  });
}

/** Open one of the models that come with the page. True if that went well. */
async function openOurs(name) {
  let file;
  const well = await attempt("card-wrong", () => during("open", `Fetching ${MODELS[name].file}`, async () => {
    if (!page.gpu) needModel();
    file = await modelFile(name);
  }));
  if (!well) return false;
  takePrompts(name);
  return openModel(file);
}

async function load(blob) {
  const bar = $("loading");
  bar.hidden = false;
  try {
    const model = await queue(() => GPT.load(page.gpu, blob, (share) => { bar.value = share; }, contextAsked()));
    await stopWriting();
    await queue(() => setModel(model));
  } finally {
    bar.hidden = true;
    bar.value = 0;
  }
  beginText({ byItself: true }).then(lookByItself);
}

/** The longest context that the page's address asks for, as in ?context=8192; undefined: the default. */
function contextAsked() {
  const asked = Number(new URLSearchParams(location.search).get("context"));
  return Number.isInteger(asked) && asked > 0 ? asked : undefined;
}

// ---- the server's checkpoints ---------------------------------------------------------------------------------------

async function listServed() {
  let found = [];
  try {
    found = await fetched("checkpoints.json", "json", "the list of its checkpoints");
  } catch (error) {  // other servers of files have no list
    const copies = navigator.serviceWorker?.controller ? " Until then this is the page as it was when it was last loaded." : "";
    if (error instanceof LostConnection) notice(error.message + copies, { "Try again": listServed });
  }
  if (!found.length) return;
  const served = $("served");
  served.hidden = false;
  const plural = found.length > 1 ? "s" : "";
  served.querySelector("summary").textContent = `${found.length} checkpoint${plural} of this server`;
  served.querySelector("ul").replaceChildren(...found.map((each) => make("li", {},
    make("button", { type: "button", onclick: () => openServed(each) }, each.name,
      make("span", {}, [each.parameters ? many(each.parameters) : "packed", megabytes(each.size)].join(", "))))));
}

function openServed({ name, path }) {
  return attempt("card-wrong", async () => openModel(await fileOf(path.replace(/^\//, ""), name)));
}

const fileOf = async (path, name = path) => new File([await fetched(path, "blob", name)], name.split("/").at(-1));

// ---- what is dropped or chosen --------------------------------------------------------------------------------------

async function kindOf(file) {
  if (/\.lenses$/i.test(file.name)) return "lens";
  if (/\.safetensors$/i.test(file.name)) return kindOfCheckpoint(file);
  if (FOREIGN.slice(0, -1).some(([name]) => name.test(file.name))) return "";
  if (TEXTS.test(file.name) || file.type.startsWith("text/")) return "text";
  const bytes = new Uint8Array(await file.slice(0, 65536).arrayBuffer());
  if (bytes[8] === 0x7b && bytes[7] === 0) return kindOfCheckpoint(file);
  try {  // a text whose name does not say so: UTF-8 without zeros; a character may be cut at the end
    new TextDecoder("utf-8", { fatal: true }).decode(bytes, { stream: true });
    return bytes.length && !bytes.includes(0) ? "text" : "";
  } catch {
    return "";
  }
}

async function kindOfCheckpoint(file) {
  const meta = await readHeader(file).then((found) => found.meta, () => null);
  return meta?.lens ? "lens" : meta?.direction ? "direction" : "model";
}

async function takeFiles(files) {
  const order = ["model", "lens", "direction", "text", ""];
  const found = await Promise.all([...files].map(async (file) => ({ file, kind: await kindOf(file) })));
  found.sort((a, b) => order.indexOf(a.kind) - order.indexOf(b.kind));
  for (const { file, kind } of found) {
    if (kind === "model") await openModel(file);
    else if (kind === "lens") choose("lens"), await takeLens(file);
    else if (kind === "direction") choose("steer"), await attempt("steer-wrong", async () => (await steering()).takeDirection(file));
    else if (kind === "text") choose("train"), await takeText(file);
    else say("card-wrong", `${file.name} is neither a checkpoint (.safetensors), nor its lenses, nor a text: ` +
      `${FOREIGN.find(([name]) => name.test(file.name))[1]}.`);
  }
}

function setUpFiles() {
  document.addEventListener("checkpoint", async ({ detail }) => {
    if (await openModel(detail)) $("writing").scrollIntoView();
  });
  $("open").addEventListener("change", async ({ target }) => {
    await takeFiles(target.files);
    target.value = "";  // so that this file can be chosen again
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
    if (chosen) tab.scrollIntoView({ block: "nearest", inline: "nearest" });  // a phone does not show all tabs
  }
  document.dispatchEvent(new CustomEvent("panel", { detail: name }));
}

/** The Steer panel's module, which is fetched when it is first needed. */
const steering = () => imported("page_steer.js");

function setUpTabs() {
  document.addEventListener("panel", ({ detail }) => { if (detail === "steer") attempt("steer-wrong", steering); });
  for (const tab of tabs()) tab.addEventListener("click", () => choose(tab.id.slice(4)));
  document.addEventListener("choose", ({ detail }) => choose(detail));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const all = tabs(), at = all.indexOf(document.activeElement);
    const n = all.length;
    const to = { ArrowRight: (at + 1) % n, ArrowLeft: (at + n - 1) % n, Home: 0, End: n - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    all[to].focus();
    choose(all[to].id.slice(4));
  });
}

function setUpColours() {
  const names = ["auto", "dark", "light"], button = $("theme");
  const tell = () => document.dispatchEvent(new CustomEvent("colours"));
  const show = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.querySelector("span").textContent = name;
    button.setAttribute("aria-label", `Colours: ${name === "auto" ? "those of the system" : name}`);
    tell();
  };
  button.addEventListener("click", () => {
    const next = names[(names.indexOf(button.querySelector("span").textContent) + 1) % names.length];
    remember("colours", next);
    show(next);
  });
  show(names.includes(recall("colours")) ? recall("colours") : "auto");
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tell);
}

function setUpPictures() {
  for (const [id, what] of [["save-picture", "panel"], ["save-next", "next"]]) {
    $(id).addEventListener("click", () => attempt(`${id}-wrong`, async () => (await imported("page_picture.js")).savePicture(what)));
  }
}

function setUpTour() {
  for (const [id, value] of recall("beforeTour") ?? []) if ($(id)) setValue($(id), value);  // the page was left during the tour
  remember("beforeTour", null);
  if (recall("tour")) $("tour").textContent = `Go on with the tour, at step ${recall("tour") + 1}`;
  $("tour").addEventListener("click", () => attempt("tour-wrong", async () => {
    needModel();
    (await imported("page_tour.js")).openTour();
  }));
}

// ---- opening the page -----------------------------------------------------------------------------------------------

async function open() {
  setUpColours();
  keepFields();
  onModel(showCard);
  [setUpWriting, setUpFiles, setUpTabs, setUpLooking, setUpTraining, setUpSpeed].forEach((each) => each());
  setUpModels(openOurs);
  setUpTour();
  setUpPictures();
  const first = setUpLinks(openOurs), demo = modelFile(first).catch((error) => error);  // while the device is opened
  listServed();
  try {
    await openDevice();
  } catch (error) {
    page.why = wordsOf(error);
    notice(page.why, {}, "alert");
    showDoing();
    $("tour-line").hidden = true;
    return attempt("write-wrong", async () => (await imported("page_recording.js")).showRecording());
  }
  await openFirst(first, await demo);
  offerRun();
  if (page.model) await begun;  // the first words come first
  imported("page_examples.js").then(({ setUpExamples }) => setUpExamples(), () => {});  // the page works without them
  await attempt("speed-wrong", () => during("kernels", "Trying faster kernels", () =>
    queue(() => chooseKernels(page.gpu, showChoices))));
  fetchRest();
}

/** The model that the page begins with. found: its file, or the error of fetching it. */
async function openFirst(name, found) {
  if (!(found instanceof Error)) return openModel(found);
  showDoing();
  notice(`${wordsOf(found)} You can also open a checkpoint of your own.`, {
    "Try again": async () => openFirst(name, await modelFile(name).catch((error) => error)) }, "alert");
}

/** Fetch all that the page may need later, so that it works without its server from then on. What cannot be fetched is fetched
 *  when it is needed. */
async function fetchRest() {
  await Promise.allSettled([page.gpu?.fetchAll(), ...LATER.map(imported), ownCode()]);
  await keepCopies().catch(() => {});  // this browser keeps none
}

/** Keep copies of the page's files, those that it has loaded until now, for service_worker.js. */
async function keepCopies() {
  const loaded = performance.getEntriesByType("resource").map(({ name }) => name.split("?")[0]);
  const files = [location.origin + location.pathname, ...loaded].filter((name) =>
    name.startsWith(location.origin) && !/\/checkpoints(\.json|\/)/.test(name));
  await (await caches.open("tinygpt")).addAll([...new Set(files)]);
  await navigator.serviceWorker.register("service_worker.js");
}

open();
