// Examples for the panels: a click sets the fields and computes the figure. page.js imports it once the first words are written.

import { $, make, onModel, page } from "./page_common.js";
import { goTo } from "./page_link.js";
import { modelName } from "./page_models.js";

const CALL = "def call(file, line, code):\n    return call(file, line,", INIT = "def __init__(self, name):\n        self.name =";
const LOAD = "import numpy as np\nimport os\n\ndef load(path):\n    return np.";
const DWARF = "The little dwarf went to the castle, and the princess said to the little", DOWN = "up and down, up and";
const DOOR = "She opened the door and went into the", QUEEN = "The queen sat down and took off";

/** By the name of the page's model: for each panel, the words on the button and the fields. What an example does not name keeps its
 *  value. */
export const EXAMPLES = {
  python: {
    lens: { "a name that is copied": { "look-prompt": CALL }, "what follows “is not”": { "look-prompt": "if x is not" },
      "a range": { "look-prompt": "for i in range(" } },
    attention: { "a head that looks back": { "look-prompt": CALL, head: "2.0" }, "a head that copies": { "look-prompt": CALL, head: "3.0" },
      "another one": { "look-prompt": LOAD, head: "3.1" } },
    ablation: { "a name that is copied": { "look-prompt": CALL, target: " code" }, "a constructor": { "look-prompt": INIT, target: " name" },
      "what follows “is not”": { "look-prompt": "if x is not", target: " None" } },
    patching: { "another argument": { "look-prompt": CALL, recipient: CALL.replace("code", "user"), target: " code" },
      "a constructor": { "look-prompt": INIT, recipient: INIT.replace("name", "value"), target: " name" } },
  },
  english: {
    lens: { "a room": { "look-prompt": DOOR }, "up and down": { "look-prompt": DOWN }, "the dwarf again": { "look-prompt": DWARF } },
    attention: { "a head that looks back": { "look-prompt": DOWN, head: "1.1" }, "a head that copies": { "look-prompt": DWARF, head: "4.2" } },
    ablation: { "the dwarf again": { "look-prompt": DWARF, target: " dwarf" }, "up and down": { "look-prompt": DOWN, target: " down" } },
    patching: { "queen and king": { "look-prompt": QUEEN, recipient: QUEEN.replace("queen", "king"), target: " her" },
      "girl and boy": { "look-prompt": "The girl was tired, so", recipient: "The boy was tired, so", target: " she" } },
  },
};
for (const each of Object.values(EXAMPLES)) each.flow = each.lens;

/** The examples of a panel for the open model. Those of English also for others that have the words in them as single tokens. */
function examplesFor(panel) {
  const name = modelName(), { enc } = page.model ?? {};
  if (name || !enc) return EXAMPLES[name]?.[panel] ?? {};
  try {
    return enc.encode(QUEEN).length === QUEEN.split(" ").length ? EXAMPLES.english[panel] ?? {} : {};
  } catch {
    return {};  // its tokenizer cannot read them
  }
}

/** Show the examples of the panel that is open. */
function show(panel) {
  const found = Object.entries(examplesFor(panel)).map(([words, fields]) => {
    const own = modelName() || !("head" in fields) ? fields : { ...fields, head: "" };  // other models have other heads
    const act = () => goTo({ panel, fields: panel === "patching" ? { pairs: "", ...own } : own });
    return make("button", { type: "button", class: "example", onclick: act }, words);
  });
  $("examples").replaceChildren(...found.length ? ["Examples:", ...found] : []);
  $("examples").hidden = !found.length;
}

export function setUpExamples() {
  const panel = () => document.querySelector("[role=tab][aria-selected=true]").id.slice(4);
  document.addEventListener("panel", ({ detail }) => show(detail));
  onModel(() => show(panel()));
  show(panel());
}
