// The tour: six steps through one prediction of the page's first model, each a panel in a certain state with a card that says
// what to look at, and why. page.js imports it when it is asked for.

import { $, make } from "./page_common.js";
import { openLink, written } from "./page_link.js";
import { MODELS } from "./page_models.js";
import { isChanged, recall, remember, setValue, valueOf } from "./page_store.js";

const PROMPT = "def call(file, line, code):\n    return call(file, line,";
const linkTo = (fields) => Object.entries({ model: Object.keys(MODELS)[0], ...fields })
  .map(([id, value]) => `${id}=${written(value)}`).join("&");

/** title; link: the state of the page; look, why: what to look at, and why it is interesting, where `…` is code; at: the place that
 *  the window scrolls to, of the first step only in narrow windows. The figures are those of demo.safetensors;
 *  tests/test_page_tour.py computes them with model.py. */
export const STEPS = [{
  title: "What the model is about to say", at: "#next-title",
  link: linkTo({ prompt: PROMPT, temperature: "1", seed: "1", length: "1" }),
  look: "The model has read the text in bold, which breaks off in the middle of a call, and wrote one token. The bars are its five " +
    "most probable tokens for that place: `·code` has 93%, and no other token reaches 1%. The dot is a blank.",
  why: "A language model does not choose a word. It gives each of its 4,096 tokens a probability, and a text is drawn from these, token " +
    "by token. The name `code` stands only in the first line: how does the model find it?",
}, {
  title: "The layer in which the answer appears", at: "#lens .result",
  link: linkTo({ panel: "lens", "look-prompt": PROMPT }),
  look: "Read the last column from the bottom to the top. Each cell is what the model would predict if it stopped after that layer. After " +
    "layer 2 it would say `·'`, with 6.1%. After layer 3 it says `·code`, with 63%, and at the end with 93%.",
  why: "The model's intermediate states can be read, and the answer is not there from the start: layer 3 brings it. The next steps look " +
    "for the parts that do this.",
}, {
  title: "A head that looks back by one token", at: "#attention .large",
  link: linkTo({ panel: "attention", "look-prompt": PROMPT, head: "2.0" }),
  look: "Each row is a token, and its dark cells are the tokens that this head reads from there. Layer 2, head 0 draws a stripe beside the " +
    "diagonal: 88% of its weight is on the previous token, where even weights would give 13%.",
  why: "After this layer, the state of the last comma also tells that `·line` stood before it. A comma alone says little; “the comma after " +
    "line” can be found again in the first line.",
}, {
  title: "A head that copies", at: "#attention .large",
  link: linkTo({ panel: "attention", "look-prompt": PROMPT, head: "3.0" }),
  look: "Now layer 3, head 0. In the last row, the one of the last comma, 84% of its weight is on `·code` in the first line: the token that " +
    "followed after the earlier `·line,`.",
  why: "This is an induction head (Olsson et al. 2022): it looks for an earlier place like this one, and copies what came next. Such heads " +
    "are found in large language models too, where they repeat names and go on with patterns of a prompt.",
}, {
  title: "Switch a part off", at: "#ablation .result",
  link: linkTo({ panel: "ablation", "look-prompt": PROMPT, target: " code" }),
  look: "Each cell is the change of the answer's log-probability, in nats, if one part gives zeros. Without layer 2's head 0, the " +
    "probability of `·code` falls from 93% to 9.6%; without layer 3's head 0, to 41%. Ten of the 15 heads can be switched off, " +
    "one at a time, and it stays above 85%. The strongest cell is layer 0's MLP, whose output all later layers read.",
  why: "A map shows what a head looks at, but not whether that matters. The two heads of the last steps do matter, the one that looks back " +
    "even more than the one that copies.",
}, {
  title: "Paste a state from another prompt", at: "#patching .result",
  link: linkTo({ panel: "patching", "look-prompt": PROMPT, recipient: PROMPT.replace("code", "user"), target: " code" }),
  look: "The second prompt, the recipient, says `user` where the first says `code`: there `·code` has a probability of 0.02%. Each cell " +
    "pastes one state of the first prompt into the run of the second. Up to layer 2, the state at the changed word brings the answer " +
    "back (1.00). After layer 3, the state of the last comma, in the last column, does so too (0.82): `·code` then has 20%.",
  why: "You see the answer move: from the word in the first line to the end of the text, in layer 3, by the heads that you have met. Parts " +
    "that work together like this are called a circuit.",
}];

let at = 0, card = null;

/** `…` as code. */
const marked = (text) => text.split("`").map((part, i) => i % 2 ? make("code", {}, part) : part);

/** Open the tour at the step at which it was left. */
export function openTour() {
  if (card) return card.querySelector("h2").focus();
  remember("beforeTour", [...document.querySelectorAll('[data-keep=""]')].map((field) => [field.id, valueOf(field)]));
  card = make("section", { class: "tour", "aria-labelledby": "tour-title", onkeydown: press });
  document.body.classList.add("touring");
  document.querySelector("main").after(card);
  show(recall("tour") ?? 0);
}

async function show(step) {
  at = Math.min(Math.max(0, step), STEPS.length - 1);
  remember("tour", at);
  const { title, link, look, why } = STEPS[at], last = at === STEPS.length - 1;
  const button = (words, act, rest = {}) => make("button", { type: "button", onclick: act, ...rest }, words);
  card.replaceChildren(
    make("p", { class: "row between hint" }, `Step ${at + 1} of ${STEPS.length}`,
      button("close", close, { class: "plain small", "aria-label": "Close the tour" })),
    make("h2", { id: "tour-title", tabindex: -1 }, title), make("p", {}, ...marked(look)),
    make("p", { class: "why" }, make("b", {}, "Why it is interesting: "), ...marked(why)),
    ...last ? [make("p", {}, "The panel ", make("a", { href: `#${linkTo({ panel: "flow", "look-prompt": PROMPT })}` }, "Flow"),
      " draws all of it in one picture. Each panel has more examples beside its prompt, and takes prompts of your own.")] : [],
    make("p", { class: "row" }, button("Back", () => show(at - 1), { disabled: at === 0 }),
      last ? button("End the tour", end, { class: "main" }) : button("Next", () => show(at + 1), { class: "main" }),
      make("a", { class: "hint", href: `#${link}` }, "show this state again")));
  card.querySelector("h2").focus({ preventScroll: true });
  await openLink(link);
  await settled();
  const { at: place } = STEPS[at];
  if (card && STEPS[at].link === link && (at || innerWidth <= 1000)) document.querySelector(place)?.scrollIntoView();
}

/** Settles when the open panel has its figure, or after a while. */
async function settled() {
  for (let i = 0; i < 100 && document.querySelector("[role=tabpanel]:not([hidden]) progress"); i++) {
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const act = { Escape: close, ArrowRight: () => at < STEPS.length - 1 && show(at + 1), ArrowLeft: () => at && show(at - 1) }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function end() {
  close();
  remember("tour", 0);
  $("tour").textContent = "Take the tour again";
}

/** Close the card. What was typed before the tour comes back, except where something else was typed since. */
function close() {
  card.remove();
  card = null;
  document.body.classList.remove("touring");
  const ours = (id) => STEPS.some(({ link }) => new URLSearchParams(link).get(id) === valueOf($(id)));
  for (const [id, value] of recall("beforeTour")) {
    if (value === valueOf($(id)) || !ours(id) && isChanged($(id))) continue;
    setValue($(id), value);
    $(id).dispatchEvent(new Event("input", { bubbles: true }));
  }
  remember("beforeTour", null);
  history.replaceState(null, "", location.pathname + location.search);
  $("tour").textContent = at ? `Go on with the tour, at step ${at + 1}` : "Take the tour";
  $("tour").focus({ preventScroll: true });
}
