// Links to a state of the page. The part of the page's address after "#" names a panel and the fields that differ from their
// defaults, as in #panel=patching&target=+name. A blank is written as "+".

import { UserError } from "./errors.js";
import { $, make, notice, onModel, page, say } from "./page_common.js";
import { fieldsOf, looksByItself } from "./page_look.js";
import { MODELS, modelName, takePrompts } from "./page_models.js";
import { defaultOf, isChanged, setValue, valueOf } from "./page_store.js";
import { beginText, begun } from "./page_write.js";

// ---- going to a state -------------------------------------------------------------------------------------------------

/** Open a panel, set fields, {id: value}, and start what the panel computes. A checkbox is true or false. look: false leaves a
 *  panel with a button of its own as it is; the panels that share the prompt always compute what they show. UserError, before
 *  anything is changed, if there is no such panel or field, or if a field cannot have this value. */
export function goTo({ panel = null, fields = {}, look = true }) {
  checkAll({ panel, fields });
  for (const [id, value] of Object.entries(fields)) {
    const field = $(id);
    if (valueOf(field) === value) continue;
    setValue(field, value);
    field.dispatchEvent(new Event("input", { bubbles: true }));  // so that the page stores it
    if (!field.closest("#subject")) field.dispatchEvent(new Event("change", { bubbles: true }));  // there it computes the panel
  }
  if (panel === null) return;
  document.dispatchEvent(new CustomEvent("choose", { detail: panel }));
  if (look && !looksByItself(panel)) document.querySelector(`#${panel} button.main`)?.click();
  const { top } = $("panels").getBoundingClientRect();
  if (top < 0 || top > innerHeight / 2) $("panels").scrollIntoView();
}

function checkAll({ panel, fields }) {
  if (panel !== null && !$(`tab-${panel}`)) throw new UserError(`This page has no panel “${panel}”.`);
  for (const [id, value] of Object.entries(fields)) check(id, value);
}

function check(id, value) {
  const field = $(id);
  if (!field || !("keep" in field.dataset)) throw new UserError(`This page has no field “${id}”.`);
  const probe = field.cloneNode(true);  // which takes a value as the field would
  setValue(probe, value);
  const can = valueOf(probe) === value && probe.checkValidity() && (value !== "" || field.type !== "number" || field.placeholder);
  if (!can) throw new UserError(`The field “${id}” cannot be “${value}”.`);
}

// ---- the address ------------------------------------------------------------------------------------------------------

const kept = (ids) => ids.filter((id) => $(id) && "keep" in $(id).dataset);
const within = (root) => [...document.querySelectorAll(`${root} [data-keep]`)].map(({ id }) => id);
const ofWriting = () => within("#writing");
const ofPanel = (name) => looksByItself(name) ? kept(fieldsOf(name)) : within(`#${name}`);

const chosen = () => document.querySelector("[role=tab][aria-selected=true]").id.slice(4);

/** The page's state as the part of an address after "#". */
export function linkOf() {
  const panel = chosen(), fields = [...ofWriting(), ...ofPanel(panel)].map($).filter(isChanged);
  const model = modelName() === Object.keys(MODELS)[0] ? null : modelName();
  const all = [["panel", panel], ...model ? [["model", model]] : [], ...fields.map((field) => [field.id, valueOf(field)])];
  const link = all.map(([id, value]) => `${id}=${written(value)}`).join("&");
  // A full stop or bracket at the end would be taken for the sentence's in which somebody writes the link.
  return link.replace(/[^\w+]$/, (last) => `%${last.charCodeAt(0).toString(16)}`);
}

/** A value as in an address, where most signs can be read. */
export function written(value) {
  const text = value === true ? "on" : value === false ? "off" : value;
  return encodeURIComponent(text).replaceAll("%20", "+").replace(/%(2C|3A|3B|2F|3D|40)/g, decodeURIComponent);
}

/** {panel, model, fields, writes} of the part of an address after "#"; null if it names no state. The fields of this panel that
 *  it does not name get their defaults, and so do those of the text, if it names one of them: `writes`. UserError. */
function read(hash) {
  if (!hash || (!hash.includes("=") && $(hash))) return null;
  const named = Object.fromEntries(hash.split("&").map((part) => {
    const at = part.indexOf("=");
    if (at < 1) throw new UserError(`“${part}” is no setting.`);
    try {
      return [part.slice(0, at), decodeURIComponent(part.slice(at + 1).replaceAll("+", " "))];
    } catch {
      throw new UserError(`“${part}” is not encoded as addresses are.`);
    }
  }));
  const { panel = null, model = null, ...values } = named, writes = ofWriting().some((id) => id in values), fields = {};
  if (model !== null && !(model in MODELS)) throw new UserError(`This page has no model “${model}”.`);
  const whole = [...writes ? ofWriting() : [], ...panel !== null && $(`tab-${panel}`) ? ofPanel(panel) : []];
  for (const id of whole) fields[id] = defaultOf($(id));
  for (const [id, value] of Object.entries(values)) fields[id] = $(id)?.type === "checkbox" ? { on: true, off: false }[value] ?? value : value;
  checkAll({ panel, fields });
  return { panel, model, fields, writes };
}

/** read(), but what is wrong is told in a notice, and the result is then null. */
function readOrTell(hash) {
  try {
    return read(hash);
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    notice(`This link cannot be opened: ${error.message} Nothing was changed.`, { Close: () => {} }, "alert");
    return null;
  }
}

const COSTLY = ["train", "speed"];  // panels in which a link presses no button
let following = false, openModel = null;

function follow({ panel, fields }) {
  following = true;
  try {
    goTo({ panel, fields, look: page.model && !COSTLY.includes(panel) });
  } finally {
    following = false;
  }
  $(panel === null ? "writing" : "panels").scrollIntoView();
}

/** Restore the state that a link names, whose part after "#" is `hash`. A link without a model is for the first of the page's
 *  models, or for the user's own that is open. */
export async function openLink(hash) {
  const state = readOrTell(hash);
  if (!state) return;
  const model = state.model ?? (modelName() && Object.keys(MODELS)[0]);
  if (page.model && model && model !== modelName()) {
    following = true;
    const opened = await openModel(model);
    following = false;
    if (!opened) return;
  }
  follow(state);
  if (state.writes && page.model) beginText();
}

/** Once the page has another state than its address names, the address names none: reloading then keeps what was typed. */
function forget() {
  if (!following && location.hash.includes("=")) history.replaceState(null, "", location.pathname + location.search);
}

// ---- setting up -------------------------------------------------------------------------------------------------------

async function copyLink() {
  const link = `#${linkOf()}`, says = $("link-says");
  history.replaceState(null, "", link);
  const own = page.model && !modelName() ? " It does not hold your checkpoint, which must be opened first." : "";
  try {
    await navigator.clipboard.writeText(location.href);
    says.replaceChildren(`Copied.${own}`);
  } catch {  // the browser allows it only on some pages
    says.replaceChildren("The browser does not let the page copy it: ", make("a", { href: link }, "this is the link"), `.${own}`);
  }
}

/** Restore the state that the page's address names, and from then on that of each link that is followed; open(name) opens one of
 *  the page's models. Returns the name of the model to begin with. */
export function setUpLinks(open) {
  openModel = open;
  $("copy-link").addEventListener("click", copyLink);
  document.addEventListener("input", ({ isTrusted }) => isTrusted && forget());
  document.addEventListener("panel", () => {
    $("link-says").replaceChildren();
    say("save-picture-wrong", "");
    forget();
  });
  let models = 0;
  onModel(() => models++ && forget());  // the first model is that of the address
  addEventListener("hashchange", () => {
    const hash = location.hash.slice(1);
    $(hash)?.closest("details")?.setAttribute("open", "");  // a word, which not every browser unfolds by itself
    openLink(hash);
  });
  const state = readOrTell(location.hash.slice(1)), model = state?.model ?? Object.keys(MODELS)[0];
  takePrompts(model);
  if (!state) return model;
  follow(state);
  // What the panel computes, once the first words are written; not if something was typed or opened meanwhile.
  if (state.panel) begun.then(() => location.hash.includes("=") && page.model && follow(state));
  return model;
}
