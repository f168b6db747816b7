// Links to a state of the page. The part of the page's address after "#" names a panel and the fields that differ from their
// defaults, as in #panel=patching&target=+name. A blank is written as "+".

import { UserError } from "./errors.js";
import { $, make, notice, page } from "./page_common.js";
import { fieldsOf, looksByItself } from "./page_look.js";
import { defaultOf, isChanged, setValue, valueOf } from "./page_store.js";
import { beginText, begun } from "./page_write.js";

// ---- going to a state -------------------------------------------------------------------------------------------------

/** Open a panel, set fields, {id: value}, and start what the panel computes. A checkbox is true or false. look: false leaves a
 *  panel with a button of its own as it is; the panels that share the prompt always compute what they show. UserError, before
 *  anything is changed, if there is no such panel or field, or if a field cannot have this value. */
export function goTo({ panel = null, fields = {}, look = true }) {
  if (panel !== null && !$(`tab-${panel}`)) throw new UserError(`This page has no panel “${panel}”.`);
  for (const [id, value] of Object.entries(fields)) check(id, value);
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
  const all = [["panel", panel], ...fields.map((field) => [field.id, valueOf(field)])];
  const link = all.map(([id, value]) => `${id}=${written(value)}`).join("&");
  // A full stop or bracket at the end would be taken for the sentence's in which somebody writes the link.
  return link.replace(/[^\w+]$/, (last) => `%${last.charCodeAt(0).toString(16)}`);
}

/** A value as in an address, where most signs can be read. */
function written(value) {
  const text = value === true ? "on" : value === false ? "off" : value;
  return encodeURIComponent(text).replaceAll("%20", "+").replace(/%(2C|3A|3B|2F|3D|40)/g, decodeURIComponent);
}

/** {panel, fields, writes} of the part of an address after "#"; null if it names no state. The fields of this panel that it
 *  does not name get their defaults, and so do those of the text, if it names one of them: `writes`. UserError. */
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
  const { panel = null, ...values } = named, writes = ofWriting().some((id) => id in values);
  const fields = {};
  for (const id of [...writes ? ofWriting() : [], ...panel !== null && $(`tab-${panel}`) ? ofPanel(panel) : []]) fields[id] = defaultOf($(id));
  for (const [id, value] of Object.entries(values)) fields[id] = $(id)?.type === "checkbox" ? { on: true, off: false }[value] ?? value : value;
  return { panel, fields, writes };
}

const COSTLY = ["train", "speed"];  // panels in which a link presses no button
let following = false;

/** Restore the state that the address names. Returns it; null if there is none. */
function follow() {
  following = true;
  try {
    const state = read(location.hash.slice(1));
    if (state) goTo({ ...state, look: page.model && !COSTLY.includes(state.panel) });
    return state;
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    notice(`This link cannot be opened: ${error.message} Nothing was changed.`, { Close: () => {} }, "alert");
    return null;
  } finally {
    following = false;
  }
}

/** Once the page has another state than its address names, the address names none: reloading then keeps what was typed. */
function forget() {
  if (!following && location.hash.includes("=")) history.replaceState(null, "", location.pathname + location.search);
}

// ---- setting up -------------------------------------------------------------------------------------------------------

async function copyLink() {
  const link = `#${linkOf()}`, says = $("link-says");
  history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(location.href);
    says.replaceChildren("Copied.");
  } catch {  // the browser allows it only on some pages
    says.replaceChildren("The browser does not let the page copy it: ", make("a", { href: link }, "this is the link"), ".");
  }
}

export function setUpLinks() {
  $("copy-link").addEventListener("click", copyLink);
  document.addEventListener("input", ({ isTrusted }) => isTrusted && forget());
  document.addEventListener("panel", () => {
    $("link-says").replaceChildren();
    forget();
  });
  addEventListener("hashchange", () => {
    const state = follow();
    if (state?.writes && page.model) beginText();
  });
  const state = follow();
  if (state?.panel) begun.then(() => location.hash && page.model && follow());  // now with the model
}
