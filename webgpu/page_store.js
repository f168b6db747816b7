// Storage beyond the life of the tab: of input fields, in localStorage; of training runs, in the origin private file system
// (OPFS).

import { $ } from "./page_common.js";

// Each value has a key of its own: when the page is opened again, or in two tabs, two processes may write at the same time, and
// each of them may not have heard yet what the other one has written.
const keyOf = (name) => `tinygpt.${name}`;

export function remember(name, value) {
  try {
    localStorage.setItem(keyOf(name), JSON.stringify(value));
  } catch {}  // the storage is full or forbidden: the page works without it
}

export function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(keyOf(name))) ?? undefined;
  } catch {
    return undefined;
  }
}

export const valueOf = (field) => field.type === "checkbox" ? field.checked : field.value;

export function setValue(field, value) {
  field[field.type === "checkbox" ? "checked" : "value"] = value;
}

/** The value that a field has in index.html. */
export function defaultOf(field) {
  if (field.type === "checkbox") return field.defaultChecked;
  return field.tagName === "SELECT" ? field.options[0].value : field.defaultValue;
}

/** Whether a field differs from its default. Others are not stored, so that a later version can change the defaults. */
export const isChanged = (field) => valueOf(field) !== defaultOf(field);

/** Restore the fields with data-keep, and store them when they change; not those with data-keep="link", which only links carry. */
export function keepFields() {
  const values = recall("fields") ?? {};
  let timer = 0;
  const fields = [...document.querySelectorAll('[data-keep=""]')];
  for (const field of fields) {
    const value = values[field.id];
    if (value !== undefined) setValue(field, value);
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

// A run is stored as files with new names, and state.json lists the files that belong together. state.json is replaced last,
// in one step: after a crash it still lists the files of the previous save.

async function folder() {
  const root = await navigator.storage.getDirectory();
  return root.getDirectoryHandle("tinygpt", { create: true });
}

async function put(where, name, content) {
  const writer = await (await where.getFileHandle(name, { create: true })).createWritable();
  await writer.write(content);
  await writer.close();
}

/** Store a run. files: {name: Blob or string}, where null keeps the previous file; state: anything that JSON can hold. */
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

/** The stored run, {files: {name: File}, state}, or null. */
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
    return null;  // the browser has no such storage, or a file is missing: no run can go on
  }
}

export async function discardRun() {
  const where = await folder();
  await where.removeEntry("state.json").catch(() => {});
  await sweep(where, []);
}

/** Store a large text, which does not fit into localStorage. */
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
