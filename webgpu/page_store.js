// What outlives the tab: what was typed, in localStorage; training runs, in the browser's private folder (OPFS).

import { $ } from "./page_common.js";

const KEY = "tinygpt";

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(KEY, JSON.stringify({ ...kept(), [name]: value }));
  } catch {}  // a full or forbidden store: the page works without
}

export const recall = (name) => kept()[name];

const valueOf = (field) => field.type === "checkbox" ? field.checked : field.value;

/** What is as it was at the start is not kept: so that a page with other defaults can have them. */
function isChanged(field) {
  if (field.type === "checkbox") return field.checked !== field.defaultChecked;
  return field.value !== (field.tagName === "SELECT" ? field.options[0].value : field.defaultValue);
}

/** Fields with data-keep are as they were left. */
export function keepFields() {
  const values = kept().fields ?? {};
  let timer = 0;
  const fields = [...document.querySelectorAll("[data-keep]")];
  for (const field of fields) {
    const value = values[field.id];
    if (value === undefined) continue;
    if (field.type === "checkbox") field.checked = value;
    else field.value = value;
  }
  const save = () => {
    clearTimeout(timer);
    remember("fields", Object.fromEntries(fields.filter(isChanged).map((field) => [field.id, valueOf(field)])));
  };
  document.addEventListener("input", ({ target }) => {
    if (!("keep" in target.dataset)) return;
    clearTimeout(timer);
    timer = setTimeout(save, 300);
  });
  addEventListener("pagehide", save);
}

// ---- files ----------------------------------------------------------------------------------------------------------

// A run is kept as files with names of their own, and state.json says which of them belong together. It is written
// last, and whole or not at all: a crash leaves the run as it was saved before.

async function folder() {
  const root = await navigator.storage.getDirectory();
  return root.getDirectoryHandle("tinygpt", { create: true });
}

async function put(where, name, content) {
  const writer = await (await where.getFileHandle(name, { create: true })).createWritable();
  await writer.write(content);
  await writer.close();
}

/** files: {name: Blob or string}, of which null keeps the one of before; state: what JSON can hold. */
export async function saveRun(files, state) {
  const where = await folder(), before = await readState(where), names = {};
  for (const [name, content] of Object.entries(files)) {
    names[name] = content === null ? before?.names[name] : `${name}-${Date.now()}`;
    if (content !== null) await put(where, names[name], content);
  }
  await put(where, "state.json", JSON.stringify({ names, state }));
  await sweep(where, Object.values(names));
}

async function readState(where) {
  try {
    return JSON.parse(await (await (await where.getFileHandle("state.json")).getFile()).text());
  } catch {
    return null;
  }
}

async function sweep(where, names) {
  for await (const name of where.keys()) {
    if (name !== "state.json" && !names.includes(name)) await where.removeEntry(name).catch(() => {});
  }
}

/** {files: {name: File}, state} of the run that is kept, or null. */
export async function keptRun() {
  try {
    const where = await folder(), found = await readState(where);
    if (!found) return null;
    const files = {};
    for (const [name, actual] of Object.entries(found.names)) {
      files[name] = await (await where.getFileHandle(actual)).getFile();
    }
    return { files, state: found.state };
  } catch {
    return null;  // no such store here, or one that is not whole: there is nothing to go on with
  }
}

export async function discardRun() {
  const where = await folder();
  await where.removeEntry("state.json").catch(() => {});
  await sweep(where, []);
}

/** A large text, which localStorage would not hold. */
export async function keepText(text) {
  const root = await navigator.storage.getDirectory();
  await put(root, "text.txt", text);
}

export async function keptText() {
  try {
    const root = await navigator.storage.getDirectory();
    return await (await (await root.getFileHandle("text.txt")).getFile()).text();
  } catch {
    return null;
  }
}
