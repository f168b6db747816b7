// The Steer panel: changes of the model while it writes, and two texts side by side, of the unchanged and of the changed model.
// page.js imports it when its tab is opened first.

import { UserError } from "./errors.js";
import { Writer } from "./gpt.js";
import { $, attempt, count, during, heard, idsOf, make, needModel, numberOf, onModel, page, partName, queueWith, resultOf, seen,
  stateName, token } from "./page_common.js";
import { bars } from "./page_draw.js";
import { settings } from "./page_write.js";
import { add, Changes, directionOf, loadDirection, off, paste, stateOf } from "./steer.js";

// A recipe says what a change does, by what was typed; changeOf() makes the change of it for a model and a prompt.
const recipes = [];
let current = null;  // the texts that are being written: {abort, done, changes, made: a Map from recipes to their changes}
let texts = null;    // what is shown: {enc, sides: [unchanged, changed]}, each side {entries, stream, view, over}
let at = null;       // the index of the token that is looked at; null: the newest one

const COPIES = "def __init__(self, name):\n        self.name =";
// With the page's own model. Of 32 texts of 60 tokens, at temperature 0.8, none names a socket, server, client or address without
// the direction of the last example, and 28 do with it.
const EXAMPLES = {
  "switch off a head that copies": [COPIES, { kind: "off", layer: 4, part: "head 2" }],
  "paste another name": [COPIES.replaceAll("name", "value"), { kind: "paste", prompt: COPIES, after: 1, from: 7, into: 7 }],
  "steer a file towards sockets": ["def open(self):\n", { kind: "add", positive: "the socket of the server and the address of the client",
    negative: "the list of items and the value of the key", after: 2, over: "mean", since: "all", strength: 0.75 }],
};

// ---- changes --------------------------------------------------------------------------------------------------------

/** The change of a recipe for a model that continues ids. UserError if the recipe does not fit them. */
async function changeOf(recipe, model, ids) {
  const { kind, after, strength } = recipe, { n_layer } = model.config, skip = model.enc.start.length;
  const first = recipe.since === "last" ? ids.length - 1 : 0;
  if (Math.max(recipe.layer ?? 0, after ?? 0) >= n_layer || Number(recipe.part?.match(/\d+/) ?? 0) >= model.heads) {
    throw new UserError(`This model has ${n_layer} layers of ${model.heads} heads: remove the change that needs another one.`);
  }
  if (kind === "off") return off(model, recipe.layer, recipe.part);
  if (kind === "file") {
    if (recipe.model !== model) throw new UserError(`${recipe.name} was made for another checkpoint: remove this change.`);
    return add(recipe.state, { after, strength, first });
  }
  if (kind === "add") {
    const both = [typed(model, recipe.positive, "The first prompt of the direction"), typed(model, recipe.negative, "The second prompt of the direction")];
    const direction = await queueWith(model, () => directionOf(model, ...both, after, { mean: recipe.over === "mean", skip }));
    return add(direction, { after, strength, first });
  }
  const donor = typed(model, recipe.prompt, "The other prompt"), from = recipe.from ?? donor.length - 1, { into } = recipe;
  if (from >= donor.length) throw new UserError(`The other prompt has the positions 0 to ${donor.length - 1}: choose one of them.`);
  if (into !== null && into >= ids.length) {
    throw new UserError(`The prompt has the positions 0 to ${ids.length - 1}: choose one of them, or none for every new token.`);
  }
  const state = await queueWith(model, () => stateOf(model, donor, after, from));
  return paste(state, { after, ...(into === null ? { first: ids.length } : { first: into, last: into + 1 }) });
}

function typed(model, text, what) {
  if (!text) throw new UserError(`${what} is empty: type one.`);
  return idsOf(model, text);
}

/** What the fields say. */
function recipeOfFields() {
  const kind = $("steer-kind").value, after = Number($("steer-after").value);
  if (kind === "off") return { kind, layer: Number($("steer-layer").value), part: $("steer-part").value };
  if (kind === "paste") return { kind, prompt: $("steer-donor").value, after, from: numberOf("steer-from"), into: numberOf("steer-into") };
  return { kind, positive: $("steer-positive").value, negative: $("steer-negative").value, after, over: $("steer-over").value,
    since: $("steer-since").value, strength: 1 };
}

/** Set the fields to what a recipe says. */
function fill({ kind, ...parts }) {
  const set = (id, value) => {
    if (value === undefined) return;
    $(`steer-${id}`).value = value ?? "";
    $(`steer-${id}`).dispatchEvent(new Event("input", { bubbles: true }));
  };
  set("kind", kind);
  set("donor", parts.prompt);
  for (const id of ["layer", "part", "from", "into", "positive", "negative", "after", "over", "since"]) set(id, parts[id]);
  showFields();
}

const quoted = (text) => `“${text.replaceAll("\n", "↵").replace(/\s+/g, " ").slice(0, 48)}${text.length > 48 ? "…" : ""}”`;

function inWords({ kind, layer, part, prompt, after, from, into, positive, negative, over, since, name }) {
  const state = after >= 0 ? `the state ${stateName(after + 1)}` : "the embedding", to = since === "last" ? "the prompt's last token and all new ones" : "all tokens";
  if (kind === "off") return `Off: ${partName(layer, part)}`;
  if (kind === "file") return `Added to ${state} of ${to}: the direction in ${name}`;
  if (kind === "add") {
    return `Added to ${state} of ${to}: the direction from ${quoted(negative)} to ${quoted(positive)}, ` +
      (over === "mean" ? "means over their tokens" : "of their last tokens");
  }
  return `Pasted: ${state} at ${from === null ? "the last position" : `position ${from}`} of ${quoted(prompt)}, into ` +
    (into === null ? "every new token" : `position ${into}`);
}

/** Put a change on the list, once it is known to fit the open model and the prompt. */
async function append(recipe) {
  const model = needModel();
  await during("steer", "Computing a state", () => changeOf(recipe, model, typed(model, $("steer-prompt").value, "The prompt")));
  recipes.push(recipe);
  drawList();
}

function drawList(focus = false) {
  const items = recipes.map((recipe, i) => {
    const item = make("li", {}, make("span", {}, inWords(recipe)), make("button", { type: "button", class: "plain small",
      "aria-label": `remove: ${inWords(recipe)}`, onclick: () => remove(recipe) }, "remove"));
    if (recipe.strength !== undefined) item.append(slider(recipe, i));
    return item;
  });
  $("steer-list").replaceChildren(...items.length ? items : [make("li", { class: "none" }, "none yet: the change that is described below acts alone")]);
  if (focus) ($("steer-list").querySelector("button") ?? $("steer-add")).focus();
}

function slider(recipe, i) {
  const shown = make("output", { for: `steer-strength-${i}` }, recipe.strength.toFixed(2));
  const input = make("input", { type: "range", id: `steer-strength-${i}`, min: -5, max: 5, step: 0.05, value: recipe.strength, oninput: () => {
    recipe.strength = Number(input.value);
    shown.textContent = recipe.strength.toFixed(2);
    turn(recipe, { strength: recipe.strength });
  } });
  return make("label", { for: `steer-strength-${i}` }, "Strength", input, shown);
}

function remove(recipe) {
  recipes.splice(recipes.indexOf(recipe), 1);
  turn(recipe, { keep: 1, strength: 0 });  // which changes nothing
  drawList(true);
}

/** Change a change while its text is being written, for the tokens that are computed from then on. */
function turn(recipe, numbers) {
  const change = current?.made.get(recipe);
  if (!change) return;
  Object.assign(change, numbers);
  current.changes.turn();
}

/** Put the direction in a file of steer.py on the list. */
export function takeDirection(file) {
  return attempt("steer-wrong", async () => {
    const model = needModel();
    const found = await during("steer", `Reading ${file.name}`, () => loadDirection(model, file));
    recipes.push({ kind: "file", name: file.name, model, ...found, since: $("steer-since").value, strength: 1 });
    drawList();
  });
}

// ---- writing --------------------------------------------------------------------------------------------------------

async function stop() {
  current?.abort.abort();
  await current?.done;
}

function writeBoth() {
  return attempt("steer-wrong", async () => {
    const own = { abort: new AbortController(), made: new Map() };
    let over;
    own.done = new Promise((resolve) => { over = resolve; });
    const model = needModel(), ids = typed(model, $("steer-prompt").value, "The prompt"), options = settings();
    $("steer-write").textContent = "Stop";
    current = own;
    resultOf("steer").replaceChildren();
    try {
      if (!recipes.length) await append(recipeOfFields());
      await during("steer", "Writing two texts", async () => {
        for (const recipe of recipes) own.made.set(recipe, await changeOf(recipe, model, ids));
        await drawTokens(model, ids, options, own);
      });
    } catch (error) {
      if (page.model === model) throw error;  // else its texts were removed with it
    } finally {
      current = null;
      $("steer-write").textContent = "Write both texts";
      over();
    }
  });
}

async function drawTokens(model, ids, options, own) {
  const { gpu } = model, { signal } = own.abort, writers = [], prompt = $("steer-prompt").value;
  try {
    await queueWith(model, () => gpu.guard(async () => {
      own.changes = new Changes(model, [...own.made.values()]);
      writers.push(new Writer(model, own.changes));
      writers.unshift(new Writer(model));
    }));
    const sides = writers.map((writer, i) => ({ entries: [], over: false, stream: model.enc.stream(), view: $(["steer-plain", "steer-changed"][i]),
      tokens: model.generate(ids, { ...options, writer, signal, probabilities: true }) }));
    texts = { enc: model.enc, sides, first: null };
    at = null;
    for (const { view } of sides) view.replaceChildren(make("span", { class: "yours" }, prompt));
    $("steer-texts").hidden = false;
    while (!signal.aborted && !sides.every(({ over }) => over)) {
      await queueWith(model, async () => {
        for (const side of sides) if (!side.over) await next(model, side);
      });
      compare();
    }
    sides.forEach(({ tokens }) => tokens.return());
    at ??= texts.first;
    show();
    summarize(options.seed, signal.aborted);
  } finally {
    (writers.length ? writers : [own.changes]).forEach((each) => each?.destroy());
  }
}

/** Take a side's next token, and show it. */
async function next(model, side) {
  const { value, done } = await side.tokens.next();
  side.over = done || model.ends.has(value.token);
  if (done) return;
  const { entries, view } = side, end = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
  if (side.over) view.append(make("span", { class: "end" }, " – the model ends its text here –"));
  else {
    const { token: id, divergence = 0 } = value, shade = Math.min(1, divergence / 2);
    const node = make("span", { class: "t", "--s": shade.toFixed(2), "data-i": entries.length }, side.stream.push(id));
    entries.push({ ...value, id, node });
    view.append(node);
  }
  if (end) view.scrollTop = view.scrollHeight;
}

/** Mark the newest tokens if they differ, also from the end of the other text, and show the predictions at the token that is
 *  looked at. */
function compare() {
  const all = texts.sides.map(({ entries }) => entries), i = Math.max(...all.map(({ length }) => length)) - 1, [plain, changed] = all.map((entries) => entries[i]);
  if (plain?.id !== changed?.id) {
    texts.first ??= i;
    for (const entry of [plain, changed]) entry?.node.classList.add("differs");
  }
  show();
}

function summarize(seed, stopped) {
  const { enc, first, sides } = texts, [plain, changed] = sides.map(({ entries }) => entries);
  const kl = changed.map(({ divergence }) => divergence), most = kl.indexOf(Math.max(...kl)), words = stopped ? ["Stopped. "] : [];
  const written = (entry) => entry ? token(enc, entry.id) : "the end of its text";
  if (!changed.length) return resultOf("steer").replaceChildren("Stopped before the first token.");
  if (first === null) words.push(`All ${count(changed.length)} tokens of both texts are equal.`);
  else {
    words.push(`Token ${count(first + 1)} is the first that differs: the unchanged model writes `, written(plain[first]), ", the changed model ",
      written(changed[first]), ".");
  }
  words.push(` Seed ${seed}. The predictions of both models after the changed model's text differ by a KL divergence of ` +
    `${(kl.reduce((a, b) => a + b) / kl.length).toFixed(2)} nats on average, and most at token ${count(most + 1)}, `, token(enc, changed[most].id),
  `: ${kl[most].toFixed(2)} nats.`);
  resultOf("steer").replaceChildren(...words);
}

/** Show both models' predictions of a token of the changed model's text. */
function show() {
  const { enc, sides } = texts, changed = sides[1].entries, n = changed.length, i = Math.min(at ?? n - 1, n - 1), entry = changed[i];
  const scrub = $("steer-scrub");
  scrub.disabled = !n;
  scrub.max = Math.max(1, n);
  scrub.value = i + 1;
  for (const { view, entries } of sides) {
    view.querySelector(".at")?.classList.remove("at");
    if (at !== null) entries[i]?.node.classList.add("at");
  }
  const rows = (top = []) => {
    const found = top.map(([id, p]) => ({ id, p, taken: id === entry.id }));
    if (found.length && !found.some(({ taken }) => taken)) {
      found.push({ id: entry.id, p: 0, taken: true, words: `< ${Math.max(1, Math.ceil(100 * found.at(-1).p))}%` });
    }
    return found;
  };
  bars($("steer-next-plain"), enc, rows(entry?.unchanged));
  bars($("steer-next"), enc, rows(entry?.top));
  if (!entry) return;
  const words = `Token ${count(i + 1)} of ${count(n)}, KL divergence ${entry.divergence.toFixed(2)} nats`;
  $("steer-says").textContent = words;
  scrub.setAttribute("aria-valuetext", `${words}: ${heard(enc, entry.id)}`);
}

function look(i) {
  at = i;
  if (texts) show();
}

// ---- setting up -----------------------------------------------------------------------------------------------------

/** Show the fields of the kind of change that is chosen; for a pasted state, also the positions of the prompts' tokens. */
function showFields() {
  const kind = $("steer-kind").value;
  for (const field of $("steer-form").querySelectorAll("[data-of]")) field.hidden = !field.dataset.of.split(" ").includes(kind);
  $("steer-places").hidden = kind === "off";
  if (kind === "add") {
    $("steer-places").textContent = "The direction is the difference of the two prompts' states. It is added, times a strength that you set, " +
      "to the states after this layer (activation addition, Turner et al. 2023). steer.py makes a file of one.";
  }
  if (kind !== "paste" || !page.model?.enc) return;
  const { enc } = page.model, ids = (id) => [...enc.start, ...enc.encode($(id).value)];
  const places = (id) => ids(id).slice(0, 64).flatMap((each, i) => [` ${i} `, token(enc, each)]);
  try {
    $("steer-places").replaceChildren("Positions there:", ...places("steer-donor"), make("br"), "Positions here:", ...places("steer-prompt"));
  } catch {  // this model cannot encode what is typed: the message comes when it is used
    $("steer-places").replaceChildren();
  }
}

/** The layers, heads and states of the open model, as choices. */
function showModel() {
  const { config: { n_layer: L }, heads: H } = page.model ?? { config: { n_layer: 1 }, heads: 1 };
  const choices = (id, pairs, value) => {
    const before = $(id).value;
    $(id).replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
    $(id).value = pairs.some(([each]) => String(each) === before) ? before : value;
  };
  const numbers = (n) => Array.from({ length: n }, (_, i) => i);
  choices("steer-layer", numbers(L).map((layer) => [layer, layer]), L - 1);
  choices("steer-part", [["attn", "attention"], ["mlp", "MLP"], ["block", "all of it"], ...numbers(H).map((head) => [`head ${head}`, `head ${head}`])], "attn");
  choices("steer-after", numbers(L + 1).map((state) => [state - 1, stateName(state)]), Math.min(2, L - 1));
  showFields();
}

function listen() {
  $("steer-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (current) current.abort.abort();
    else writeBoth();
  });
  $("steer-form").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || current) return;
    event.preventDefault();
    writeBoth();
  });
  $("steer-add").addEventListener("click", () => attempt("steer-wrong", () => append(recipeOfFields())));
  $("steer-open").addEventListener("change", async ({ target }) => {
    if (target.files.length) await takeDirection(target.files[0]);
    target.value = "";  // so that this file can be chosen again
  });
  $("steer-write").disabled = false;
  $("steer-kind").addEventListener("change", showFields);
  for (const id of ["steer-prompt", "steer-donor"]) $(id).addEventListener("input", showFields);
  $("steer-examples").replaceChildren(...Object.entries(EXAMPLES).map(([label, [prompt, recipe]]) => make("button", {
    type: "button", class: "plain small", onclick: async () => {
      await stop();
      $("steer-prompt").value = prompt;
      $("steer-prompt").dispatchEvent(new Event("input", { bubbles: true }));
      fill(recipe);
      recipes.splice(0, recipes.length, { ...recipe });
      drawList();
      await writeBoth();
    } }, label)));
  const tokenAt = (event) => event.target.closest?.(".t");
  for (const view of [$("steer-plain"), $("steer-changed")]) {
    view.addEventListener("pointerover", (event) => event.pointerType === "mouse" && tokenAt(event) && look(Number(tokenAt(event).dataset.i)));
    view.addEventListener("click", (event) => look(tokenAt(event) ? Number(tokenAt(event).dataset.i) : null));
  }
  $("steer-scrub").addEventListener("input", ({ target }) => {
    look(Number(target.value) - 1);
    texts?.sides.forEach(({ entries }) => entries[at]?.node.scrollIntoView({ block: "nearest" }));
  });
}

listen();
drawList();
showModel();
onModel(() => {
  current?.abort.abort();
  texts = null;
  $("steer-texts").hidden = true;
  $("steer-plain").replaceChildren();
  $("steer-changed").replaceChildren();
  resultOf("steer").replaceChildren();
  showModel();
});
